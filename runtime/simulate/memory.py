"""Whether what is simulated fits: weights, slots and the KV cache in the memory of each GPU."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeless_opt.problems.arrays import FloatArray
from moeless_opt.problems.errors import InfeasibleError
from moeless_opt.problems.spec import Topology
from moeless_opt.runtime.simulate.hardware import GPUS
from moeless_opt.runtime.simulate.machine import Machine

__all__ = ["USABLE", "Room"]

USABLE = 0.95
"""Share of a data sheet's GB (10^9 bytes; cards have as many GiB, of which this is 88 %) that weights and the
KV cache may fill (assumed)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """The memory of a GPU, and what has to lie in it.

    Parameters
    ----------
    machine : Machine
        Model and GPUs.
    memory : float
        Bytes of each GPU for weights and the KV cache.
    """

    machine: Machine
    memory: float

    @classmethod
    def of(cls, machine: Machine, gigabytes: float | None = None) -> Room:
        """With so many GB of each GPU, by default what its data sheet leaves."""
        memory = USABLE * GPUS[machine.gpu].memory if gigabytes is None else gigabytes * 1e9
        return cls(machine=machine, memory=memory)

    @property
    def others(self) -> float:
        """Bytes of one GPU outside the routed experts and the KV cache."""
        return self.machine.other_bytes / self.machine.topology.gpus

    def experts_G(self, topology: Topology) -> FloatArray:
        """Bytes of all slots of each GPU, shape [G]."""
        model = self.machine.model
        bytes_L = np.full(model.layers, model.expert_bytes, dtype=np.int64)
        return np.asarray(bytes_L @ topology.capacity_LG(bytes_L, model.experts), dtype=np.float64)

    def tokens(self, topology: Topology) -> float:
        """Tokens whose keys and values find room beside full slots, over all GPUs."""
        free = self.memory - self.others - float(self.experts_G(topology).max())
        return topology.gpus * free / max(self.machine.kv_token_bytes, 1e-30)

    def fits(self, topology: Topology) -> bool:
        """Whether the weights do."""
        return self.tokens(topology) > 0

    def check(self, topology: Topology) -> None:
        """Refuse what does not fit.

        Raises
        ------
        InfeasibleError
            Saying what needs how much.
        """
        if self.fits(topology):
            return
        model, experts = self.machine.model, float(self.experts_G(topology).max())
        slots = int((self.memory - self.others) // (model.layers * model.expert_bytes))
        least = -(-model.experts // topology.gpus)
        what = "not even one copy of each does"
        if slots >= least:
            what = f"{slots} slots per GPU and layer do"
        raise InfeasibleError(
            f"memory: {experts / 1e9:.1f} GB of experts and {self.others / 1e9:.1f} GB of other weights do "
            f"not fit in {self.memory / 1e9:.1f} GB of one {self.machine.gpu}; {what}"
        )

    def check_cache(self, topology: Topology, tokens: float) -> None:
        """Refuse a KV cache that does not fit beside full slots."""
        room = self.tokens(topology)
        if tokens > room:
            raise InfeasibleError(
                f"memory: the KV cache of {tokens:,.0f} tokens does not fit beside the weights: there is "
                f"room for {room:,.0f} on GPUs of {self.memory / 1e9:.1f} GB; try fewer slots or less traffic"
            )

    def text(self, topology: Topology) -> str:
        """What fits, for people."""
        experts = float(self.experts_G(topology).max())
        return (
            f"memory: {self.memory / 1e9:.1f} GB of each GPU for {experts / 1e9:.1f} GB of experts, "
            f"{self.others / 1e9:.1f} of other weights and a KV cache of {self.tokens(topology):,.0f} tokens"
        )
