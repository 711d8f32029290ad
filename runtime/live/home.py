"""Second copies of the experts, off the GPUs: where a cold start or the loss of a rank gets them from."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from moeless_opt.problems.arrays import whole
from moeless_opt.problems.errors import FormatError
from moeless_opt.runtime.live.experts import SlotBank, Weights
from moeless_opt.runtime.live.groups import ExpertGroup

__all__ = ["HomeStore", "MappedHome", "NodeHome", "PinnedHome", "host_copy", "save_experts"]


class HomeStore(Protocol):
    """Somewhere that has experts. Which ranks have which must be known to all of them."""

    def ranks(self, layer: int, expert: int) -> Sequence[int]:
        """Ranks of the group that can read the expert."""
        ...

    def read(self, layer: int, expert: int) -> Weights:
        """The expert's tensors on the CPU; only on a rank that has it."""
        ...

    def regroup(self, members: Sequence[int]) -> None:
        """The group now has these (global) ranks."""
        ...


class PinnedHome:
    """Copies in host memory (pinned where there is CUDA), each expert on several ranks.

    Parameters
    ----------
    copies : int
        Ranks that keep each expert. Two survive the loss of any one rank.
    """

    def __init__(self, copies: int = 2) -> None:
        self.copies = whole("copies", copies, low=1)
        self._mine: dict[tuple[int, int], Weights] = {}
        # Holders by global rank, so that they mean the same in every group.
        self._holders: dict[tuple[int, int], list[int]] = {}
        self._members: tuple[int, ...] = ()

    def ranks(self, layer: int, expert: int) -> Sequence[int]:
        """See `HomeStore.ranks`."""
        holders = self._holders.get((layer, expert), [])
        return [self._members.index(r) for r in holders if r in self._members]

    def read(self, layer: int, expert: int) -> Weights:
        """See `HomeStore.read`."""
        return self._mine[layer, expert]

    @property
    def bytes(self) -> int:
        """Host memory in use on this rank."""
        return sum(t.numel() * t.element_size() for w in self._mine.values() for t in w)

    def regroup(self, members: Sequence[int]) -> None:
        """Count only these ranks; `fill` makes new copies of what the others had."""
        self._members = tuple(members)

    def fill(
        self, group: ExpertGroup, banks: Sequence[SlotBank], rows_LG: Sequence[Sequence[Sequence[int]]]
    ) -> None:
        """Bring every expert to the wanted number of copies; all ranks call it, between forwards.

        The first copy is made on a rank that serves the expert, the next ones on the ranks that follow it: a
        rank's own host memory is lost with the rank.
        """
        self.learn(group, banks)
        copies = min(self.copies, group.size)
        more: dict[tuple[int, int], list[int]] = {}
        for layer, bank in enumerate(banks):
            sends: list[tuple[torch.Tensor, int, int]] = []
            receives: list[tuple[torch.Tensor, int, int]] = []
            holders: dict[int, list[int]] = {}
            for g, row in enumerate(rows_LG[layer]):
                for e in row:
                    holders.setdefault(e, []).append(g)
            arrivals: list[tuple[int, Weights]] = []
            for e in sorted(holders):
                have = list(self.ranks(layer, e))
                source = holders[e][0]
                wanted = [(source + k) % group.size for k in range(group.size)]
                for g in [g for g in wanted if g not in have][: max(0, copies - len(have))]:
                    more.setdefault((layer, e), []).append(group.ranks[g])
                    if group.rank == g and e in bank.resident:
                        self._mine[layer, e] = [host_copy(t) for t in bank.resident[e]]
                    elif g in holders[e]:
                        continue
                    elif group.rank == g:
                        # On its way to host memory: no expert of the device's, so no limit counts it.
                        room = [torch.empty(s, dtype=d, device=bank.device) for s, d in bank.shapes]
                        arrivals.append((e, room))
                        receives += [(t, source, 16 * e + k) for k, t in enumerate(room)]
                    elif group.rank == source:
                        # NCCL matches by order and gloo by tag: both agree here.
                        sends += [(t.data, g, 16 * e + k) for k, t in enumerate(bank.resident[e])]
            group.wait(group.exchange(sends, receives))
            for e, room in arrivals:
                self._mine[layer, e] = [host_copy(t) if t.is_cuda else t for t in room]
        # Only now: a rank that fails above is not taken for one that has copies.
        for key, ranks in more.items():
            self._holders[key] = [*self._holders.get(key, ()), *ranks]

    def learn(self, group: ExpertGroup, banks: Sequence[SlotBank]) -> None:
        """Hear from everybody which copies it has; all ranks call it.

        A loss may come at any moment: while copies travel some ranks have theirs and others never get them.
        """
        experts = 1 + max((e for bank in banks for e in (*bank.resident, *bank.staged)), default=-1)
        experts = max(experts, 1 + max((e for _, e in self._mine), default=-1))
        experts = max(row[0] for row in group.gather_ints([experts]))
        keys = [(layer, e) for layer in range(len(banks)) for e in range(experts)]
        rows = group.gather_ints([int(key in self._mine) for key in keys])
        self._members = group.ranks
        self._holders = {
            key: [r for r, row in zip(group.ranks, rows, strict=True) if row[i]] for i, key in enumerate(keys)
        }


#: Bytes from which host memory is registered as it is; below, what torch rounds up does not matter.
LARGE = 1 << 20


def host_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in host memory, pinned if it comes from a GPU."""
    host = _pinned(tensor) if tensor.is_cuda else torch.empty(tensor.shape, dtype=tensor.dtype)
    return host.copy_(tensor.detach())


def _pinned(like: torch.Tensor) -> torch.Tensor:
    """Host memory that a GPU reads by itself, and no more than is needed: torch's comes in powers of two."""
    size = like.numel() * like.element_size()
    if size >= LARGE and size & (size - 1):
        host = torch.empty(like.shape, dtype=like.dtype)
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        if int(runtime.cudaHostRegister(host.data_ptr(), size, 0)) == 0:
            weakref.finalize(host, runtime.cudaHostUnregister, host.data_ptr()).atexit = False
            return host
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)


class NodeHome:
    """All experts once in the host memory of every node: each of its ranks has a share.

    For engines that load every expert on every rank anyway: nothing travels to fill it. A share is other
    experts than those that the rank serves at first, so that no rank's death takes both away.

    Parameters
    ----------
    group : ExpertGroup
        The ranks, with their nodes.
    experts : int
        Of a layer.
    """

    def __init__(self, group: ExpertGroup, experts: int) -> None:
        self._members = group.ranks
        self._mine: dict[tuple[int, int], Weights] = {}
        nodes: dict[int, list[int]] = {}
        for rank, node in zip(group.ranks, group.node_R, strict=True):
            nodes.setdefault(node, []).append(rank)
        #: Global ranks that keep each expert, one a node.
        self.holders_E = [
            [ranks[(e * len(ranks) // experts + 1) % len(ranks)] for ranks in nodes.values()]
            for e in range(experts)
        ]
        me = group.ranks[group.rank]
        #: Experts of this rank's share.
        self.share = [e for e, holders in enumerate(self.holders_E) if me in holders]

    def put(self, layer: int, expert: int, weights: Weights) -> None:
        """Keep copies of an expert of this rank's share."""
        self._mine[layer, expert] = [host_copy(t) for t in weights]

    def ranks(self, layer: int, expert: int) -> Sequence[int]:
        """See `HomeStore.ranks`."""
        return [self._members.index(r) for r in self.holders_E[expert] if r in self._members]

    def read(self, layer: int, expert: int) -> Weights:
        """See `HomeStore.read`."""
        return self._mine[layer, expert]

    def regroup(self, members: Sequence[int]) -> None:
        """Shares of ranks that are away are out of reach; one that comes back has loaded its own again."""
        self._members = tuple(members)


class MappedHome:
    """Experts in safetensors files that every rank can map: no memory of its own, and it survives any loss.

    Parameters
    ----------
    folder : path
        Written by `save_experts`.
    gpus : int
        Ranks of the expert-parallel group.
    layers : sequence of int, optional
        The live model's layers (its ``layers``), where the folder has those of other pipeline stages, too.
    """

    def __init__(self, folder: str | Path, gpus: int, layers: Sequence[int] | None = None) -> None:
        from safetensors import safe_open

        self.folder = Path(folder)
        self._gpus = gpus
        self._file: dict[tuple[int, int], Any] = {}
        for path in sorted(self.folder.glob("experts-*.safetensors")):
            handle = safe_open(str(path), framework="pt")
            for key in handle.keys():  # type: ignore[no-untyped-call]  # noqa: SIM118 (no mapping)
                layer, expert, _ = key.split(".")
                self._file[int(layer), int(expert)] = handle
        if not self._file:
            raise FormatError(
                str(self.folder), "holds no experts-*.safetensors file; write them with save_experts"
            )
        here = sorted({layer for layer, _ in self._file})
        if lacking := sorted(set(layers or ()) - set(here)):
            raise FormatError(str(self.folder), f"has no experts of layers {lacking}, only of {here}")
        self._layers = here if layers is None else list(layers)

    def ranks(self, layer: int, expert: int) -> Sequence[int]:
        """See `HomeStore.ranks`: everybody reads the files."""
        here = layer < len(self._layers) and (self._layers[layer], expert) in self._file
        return range(self._gpus) if here else ()

    def read(self, layer: int, expert: int) -> Weights:
        """See `HomeStore.read`."""
        number = self._layers[layer]
        handle = self._file[number, expert]
        weights: Weights = []
        while f"{number}.{expert}.{len(weights)}" in handle.keys():  # noqa: SIM118
            weights.append(handle.get_tensor(f"{number}.{expert}.{len(weights)}"))
        return weights

    def regroup(self, members: Sequence[int]) -> None:
        """Nothing is lost."""
        self._gpus = len(members)


def save_experts(folder: str | Path, group: ExpertGroup, banks: Sequence[SlotBank], rows_LG: Any) -> None:
    """Write every expert once, each by the first rank that serves it; all ranks call it.

    Parameters
    ----------
    folder : path
        Created if missing; must be reachable from every rank that shall read it.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    for layer, bank in enumerate(banks):
        first: dict[int, int] = {}
        for g, row in enumerate(rows_LG[layer]):
            for e in row:
                first.setdefault(e, g)
        for e, weights in bank.resident.items():
            if first[e] == group.rank:
                key = f"{bank.layer}.{e}"
                tensors |= {f"{key}.{i}": t.detach().cpu().contiguous() for i, t in enumerate(weights)}
    if tensors:
        # A new name, then a rename: nobody maps a half-written file.
        final = folder / f"experts-{group.ranks[group.rank]:05d}.safetensors"
        draft = final.with_suffix(".part")
        save_file(tensors, str(draft))
        draft.rename(final)
    group.gather_ints([0])
