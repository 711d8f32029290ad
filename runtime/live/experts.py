"""The slots of one rank: experts that serve, and experts that have arrived but do not serve yet."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module, ModuleList, Parameter

from moeless_opt.problems.errors import ProblemError
from moeless_opt.runtime.live.rows import pieces

__all__ = ["MemoryMeter", "SlotBank", "SlotExperts", "Weights", "bind_weights", "checksum", "weights_bytes"]

Weights = list[Tensor]


def weights_bytes(weights: Sequence[Tensor]) -> int:
    """Bytes of the tensors of one expert."""
    return sum(t.numel() * t.element_size() for t in weights)


def checksum(weights: Sequence[Tensor]) -> int:
    """A 63-bit number of the weights' bytes, the same on every device.

    Sums of rows and columns of the bytes read as 64-bit integers, weighted by position and allowed to wrap:
    integer addition does not care about order, so a GPU gets what a CPU gets, and no copy of the weights is
    needed. It catches damage, not malice.
    """
    total = 0
    for k, tensor in enumerate(weights):
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        if flat.numel() % 8 or flat.data_ptr() % 8:
            flat = torch.nn.functional.pad(flat.clone(), (0, -flat.numel() % 8))
        words = flat.view(torch.int64)
        width = 1024
        whole = words[: words.numel() // width * width].view(-1, width)
        tail = words[whole.numel() :]
        total = total * 31 + k + 1
        for part in (whole.sum(0), whole.sum(1), tail):
            place = torch.arange(3, 3 + part.numel(), device=part.device)
            total = (total * 1_000_003 + int((part * place).sum())) & 0x7FFF_FFFF_FFFF_FFFF
    return total


class MemoryMeter:
    """Bytes of expert weights that are alive in this process on the model's device, and their peak.

    It counts tensors from their creation until they are really freed, so a forgotten reference shows.

    Parameters
    ----------
    hard_limit : int, optional
        Refuse allocations beyond it.
    """

    def __init__(self, hard_limit: int | None = None) -> None:
        self.now = 0
        self.peak = 0
        self.hard_limit = hard_limit
        self._charged, self._since = 0.0, time.perf_counter()
        # Threads that move weights make and free some; one may free others within its own count.
        self._lock = threading.RLock()

    @property
    def byte_seconds(self) -> float:
        """Bytes times the seconds for which they were alive, since the meter was made."""
        with self._lock:
            self._charge()
            return self._charged

    def _charge(self) -> None:
        now = time.perf_counter()
        self._charged += self.now * (now - self._since)
        self._since = now

    def track(self, tensor: Tensor) -> Tensor:
        """Count a tensor until it is freed."""
        size = tensor.numel() * tensor.element_size()
        with self._lock:
            self._charge()
            self.now += size
            self.peak = max(self.peak, self.now)
        weakref.finalize(tensor, self._freed, size).atexit = False
        return tensor

    def _freed(self, size: int) -> None:
        with self._lock:
            self._charge()
            self.now -= size

    def reset_peak(self) -> None:
        """Measure the peak from here."""
        self.peak = self.now


class SlotBank:
    """Experts of one layer on one rank.

    Parameters
    ----------
    layer : int
        The model's own number of it, for messages.
    resident : dict of int to list of Tensor
        Experts that the rank holds now. The tensors are used as they are.
    like : list of Tensor
        Any expert's tensors, for shapes and types (also where the rank holds none).
    meter : MemoryMeter
        Counts what the bank allocates.
    on_install : callable, optional
        Called with the experts in slot order after each change.
    """

    def __init__(
        self,
        layer: int,
        resident: dict[int, Weights],
        like: Sequence[Tensor],
        device: torch.device,
        meter: MemoryMeter,
        on_install: Callable[[SlotBank], None] | None = None,
    ) -> None:
        self.layer = layer
        self.shapes = [(t.shape, t.dtype) for t in like]
        self.device = device
        self.meter = meter
        self.resident = dict(resident)
        self.staged: dict[int, Weights] = {}
        self.order: tuple[int, ...] = tuple(resident)
        self.expert_bytes = weights_bytes(like)
        self.on_install = on_install
        self._trained = False
        for weights in self.resident.values():
            for tensor in weights:
                meter.track(tensor)

    def trains(self) -> bool:
        """Whether weights of experts that are here want gradients; those that arrive do if these did."""
        if not self.resident:
            return False  # whatever was so before: they may have been frozen since, elsewhere
        self._trained = any(t.requires_grad for weights in self.resident.values() for t in weights)
        return self._trained

    def allocate(self) -> Weights:
        """Room for one expert.

        Raises
        ------
        MemoryError
            If the meter's limit or the device does not allow it.
        """
        self.check_room(1)
        try:
            fresh = [torch.empty(shape, dtype=dtype, device=self.device) for shape, dtype in self.shapes]
        except torch.OutOfMemoryError as error:
            raise MemoryError(str(error)) from error
        return [self.meter.track(Parameter(t, requires_grad=False)) for t in fresh]

    def check_room(self, experts: int) -> None:
        """Raise MemoryError where so many more would exceed the meter's limit."""
        limit, more = self.meter.hard_limit, experts * self.expert_bytes
        if limit is not None and self.meter.now + more > limit:
            raise MemoryError(f"{more} bytes more than the {self.meter.now} held exceed the limit of {limit}")

    def settle(self) -> None:
        """Called when what serves has changed, and nothing holds what left any more."""

    def weights(self, expert: int) -> Weights:
        """Tensors of an expert that serves or is staged here."""
        found = self.resident.get(expert) or self.staged.get(expert)
        if found is None:
            raise ProblemError("expert", f"expert {expert} of layer {self.layer} is not on this rank")
        return found

    def install(self, experts: Sequence[int], keep: Sequence[int] = ()) -> None:
        """Serve exactly these experts from now on; staged ones are taken in, others are let go.

        What is in `keep` stays in memory: staged, as if it had just arrived.
        """
        trains = self.trains() if self.resident else self._trained
        kept = {e: self.resident[e] for e in keep}
        self.resident = {e: self.weights(e) for e in experts}
        self.staged |= kept
        for e in experts:
            for tensor in self.staged.pop(e, ()):
                tensor.requires_grad_(trains)
        self.order = tuple(experts)
        if self.on_install is not None:
            self.on_install(self)
        self.settle()

    def drop_staged(self, keep: Sequence[int] = ()) -> None:
        """Free staged experts, except some."""
        self.staged = {e: w for e, w in self.staged.items() if e in keep}


def bind_weights(shell: Module, weights: Sequence[Tensor]) -> Module:
    """A copy of a module that has other parameters.

    Only the containers are copied: configuration, process groups, hooks and functions stay shared, and no
    constructor runs (megatron's would initialise random weights first).

    Parameters
    ----------
    shell : Module
        Its parameters may be on the meta device.
    weights : sequence of Tensor
        In the order of ``shell.parameters()``.
    """
    return _clone(shell, iter(weights))


def _clone(module: Module, supply: Iterator[Tensor]) -> Module:
    # No closure: a function that refers to itself would keep the weights until the next garbage collection.
    twin = module.__new__(type(module))
    twin.__dict__ = dict(module.__dict__)
    for name in ("_parameters", "_buffers", "_modules"):
        twin.__dict__[name] = dict(module.__dict__[name])
    for name, old in module._parameters.items():
        if old is not None:
            new = next(supply)
            twin._parameters[name] = (
                new if isinstance(new, Parameter) else Parameter(new, requires_grad=False)
            )
    for name, child in module._modules.items():
        if child is not None:
            twin._modules[name] = _clone(child, supply)
    return twin


def meta_shell(module: Module) -> Module:
    """The module without its weights: what `bind_weights` copies."""
    return bind_weights(
        module,
        [Parameter(torch.empty_like(p, device="meta"), requires_grad=False) for p in module.parameters()],
    )


class SlotExperts(Module):
    """Runs the experts of a `SlotBank`; takes the place of megatron-core's `SequentialMLP`.

    Parameters
    ----------
    shell : Module
        An expert without weights, from `meta_shell`.
    probs_on_input : bool
        Scale the input rather than the activations by the router's weight (`moe_apply_probs_on_input`).
    """

    def __init__(self, shell: Module, probs_on_input: bool) -> None:
        super().__init__()
        # Kept out of the module tree: a shell has no weights to save or to move.
        self.__dict__["shell"] = shell
        self.probs_on_input = probs_on_input
        #: Rows of one product; see `live.rows`.
        self.most_rows: int | None = None
        self.local_experts = ModuleList()
        self._units: dict[int, Module] = {}

    def adopt(self, expert: int, module: Module) -> None:
        """Use this module for the expert for as long as the expert stays."""
        self._units[expert] = module

    def follow(self, bank: SlotBank) -> None:
        """Serve what the bank holds."""
        self._units = {e: self._units.get(e) or self._bound(bank.resident[e]) for e in bank.order}
        self.local_experts = ModuleList(self._units.values())

    def _bound(self, weights: Weights) -> Module:
        return bind_weights(self.__dict__["shell"], weights)

    def unit(self, expert: int) -> Module:
        """The module of an expert that is here."""
        return self._units[expert]

    def forward(self, tokens: Tensor, tokens_per_expert: Any, probs: Tensor) -> tuple[Tensor, None]:
        """Each slot's rows through its expert; slots without tokens cost nothing."""
        sizes = np.asarray(tokens_per_expert).tolist()
        if self.probs_on_input:
            tokens = (probs.unsqueeze(-1) * tokens).to(tokens.dtype)
            probs = torch.ones_like(probs)
        units, sizes = pieces(self._units.values(), sizes, self.most_rows)
        parts = [
            unit(x, p)[0]
            for unit, x, p in zip(units, torch.split(tokens, sizes), torch.split(probs, sizes), strict=True)
        ]
        if len(parts) == 1:
            return parts[0], None
        return (torch.cat(parts) if parts else tokens), None
