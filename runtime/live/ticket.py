"""A plan of one layer on its way, as `lanes` carries it out."""

from __future__ import annotations

from dataclasses import dataclass, field

from moeless_opt.problems.arrays import BoolArray, SlotArray
from moeless_opt.runtime.live.courier import Flight
from moeless_opt.runtime.live.experts import Weights

__all__ = ["REFUSED", "UNPLANNED", "Ticket"]

#: Checksums of a ticket that has no slots yet, and of one that this rank cannot carry out.
UNPLANNED, REFUSED = 0, -1


@dataclass(eq=False)
class Ticket:
    """A plan of one layer, from its opening to its end.

    Parameters
    ----------
    number : int
        In order of opening, from 1.
    layer : int
        The model's own number of it.
    base_GC : array of int32, shape [G, C]
        Where the layer was heading when it was opened: what to plan from. The same on all ranks.
    index : int
        Of the layer among the MoE layers.
    serve : bool
        Whether the slots shall serve; else they are only made warm.
    status : str
        ``"open"``, ``"moving"``, ``"ready"``, ``"done"``, ``"superseded"`` or ``"void"``.
    reason : str
        Why it is void.
    cold, from_home, bytes : int
        Replicas that had to be loaded, over all ranks; of these from home copies; and their bytes.
    opened, adopted, ended : int
        Forward passes of the model at these moments.
    seconds : float
        From posting its transfers until those to this rank had arrived.
    """

    number: int
    layer: int
    base_GC: SlotArray
    index: int = 0
    serve: bool = True
    status: str = "open"
    reason: str = ""
    cold: int = 0
    from_home: int = 0
    bytes: int = 0
    opened: int = 0
    adopted: int = 0
    ended: int = 0
    seconds: float = 0.0
    slots_GC: SlotArray | None = field(default=None, repr=False)
    digest: int = field(default=UNPLANNED, repr=False)
    room: dict[tuple[int, int], Weights] = field(default_factory=dict, repr=False)
    flight: Flight | None = field(default=None, repr=False)
    #: Which rank is to have which expert, and what of it has to be loaded, [G, E].
    wanted_GE: BoolArray | None = field(default=None, repr=False)
    arrivals_GE: BoolArray | None = field(default=None, repr=False)

    @property
    def over(self) -> bool:
        """Whether nothing more will become of it."""
        return self.status in ("done", "superseded", "void")
