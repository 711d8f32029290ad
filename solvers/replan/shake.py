"""Fewer moves by destroying and repairing a re-plan (large neighbourhood search).

A finished re-plan differs from the live placement on a few GPUs. Each round puts some of those GPUs back to
what they hold live, which takes their moves back, and fills the overflow again with a randomly perturbed
ranking. The result is kept when it moves no more replicas than before; equal counts are accepted too, since
walking along plateaus is what lets the search leave a local optimum; so are rounds that place a random
replica first. Moves that later ones made needless disappear by the same step (put back, nothing to repair).

References
----------
Shaw (1998), "Using constraint programming and local search methods to solve vehicle routing problems".
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moeless_opt.solvers.core import Stop
from moeless_opt.solvers.limits import Rules, rows_of
from moeless_opt.solvers.replan.fill import LIGHT, fill_overflow
from moeless_opt.solvers.replan.flow import LayerFlow
from moeless_opt.solvers.replan.live import moves_between

__all__ = ["Shaker", "put_back"]

_MOST_BACK = 6  # GPUs put back in one round, at most
_KICK = 0.3  # share of the rounds that also take a random step


def put_back(
    live: Sequence[frozenset[int]], content: Sequence[Sequence[int]], gpus: Sequence[int], experts: int
) -> list[list[int]]:
    """Contents with some GPUs as they are live, and as many others as coverage then asks for."""
    back = set(gpus)
    while True:
        row_G = [sorted(live[gpu]) if gpu in back else list(row) for gpu, row in enumerate(content)]
        held = set().union(*row_G)
        if len(held) == experts:
            return row_G
        missing = [expert for expert in range(experts) if expert not in held]
        wanted = {gpu for gpu, row in enumerate(live) if any(expert in row for expert in missing)}
        if wanted <= back:
            return [list(row) for row in content]
        back |= wanted


class Shaker:
    """Improve one layer's re-plan that reaches the wanted time, some rounds at a time.

    Parameters
    ----------
    load, capacity, room
        As for `LayerFlow`.
    live : sequence of frozenset of int
        Experts that each GPU holds now.
    content : sequence of sequence of int
        The re-plan: experts on each GPU, nothing overflows.
    least : int
        A proven least number of moves: reached, the search ends.
    seed : int
        Source of all choices.
    rules : Rules, optional
        Limits that the re-plan keeps.

    Attributes
    ----------
    content : list of list of int
        Best found: moves no more replicas than what was given.
    moves : int
        Its moves.
    """

    def __init__(
        self,
        load: list[int],
        live: Sequence[frozenset[int]],
        content: Sequence[Sequence[int]],
        capacity: list[int],
        room: list[int],
        *,
        least: int = 0,
        seed: int | tuple[int, ...] = 0,
        rules: Rules | None = None,
    ) -> None:
        self._rules = rules
        self._load, self._capacity, self._room = load, capacity, room
        self._live, self._least = live, least
        self._rng = np.random.default_rng(seed)
        self.content = [list(row) for row in content]
        self.moves = moves_between(live, self.content)

    @property
    def done(self) -> bool:
        """Whether the moves are proven least."""
        return self.moves <= self._least

    def round(self, stop: Stop | None = None) -> None:
        """Destroy and repair once; a round that is stopped changes nothing."""
        rng, live = self._rng, self._live
        changed = [
            gpu for gpu, row in enumerate(self.content) if any(expert not in live[gpu] for expert in row)
        ]
        size = int(rng.integers(1, min(len(changed), _MOST_BACK) + 1))
        chosen = rng.choice(changed, size=size, replace=False).tolist()
        trial = put_back(live, self.content, chosen, len(self._load))
        if self._rules is not None and not self._rules.keeps(rows_of(trial, len(self._load))):
            return
        state = LayerFlow(self._load, trial, self._capacity, self._room, self._rules)
        if rng.random() < _KICK and state.solve() > 0:
            self._kick(state)
        kept = moves_between(live, state.content)
        if kept > self.moves:
            return
        if fill_overflow(state, LIGHT, rng=rng, budget=self.moves - kept, stop=stop) > 0:
            return
        found = moves_between(live, state.content)
        if found <= self.moves:
            self.content, self.moves = state.content, found

    def _kick(self, state: LayerFlow) -> None:
        """Add one or two random replicas, heavy experts likelier: steps that no single gain would suggest."""
        rng, load = self._rng, self._load
        weight = np.array(load, dtype=np.float64) / max(state.total, 1)
        for _ in range(int(rng.integers(1, 3))):
            expert, gpu = int(rng.choice(len(load), p=weight)), int(rng.integers(state.gpus))
            row, home = state.content[gpu], state.home
            if gpu in home[expert]:
                continue
            adds, drops = [(expert, gpu)], []
            if len(row) >= state.capacity[gpu]:
                spare = [other for other in row if len(home[other]) > 1]
                if spare:
                    drops = [(spare[int(rng.integers(len(spare)))], gpu)]
                elif row:
                    other, source = row[int(rng.integers(len(row)))], home[expert][0]
                    if source in home[other]:
                        continue
                    adds.append((other, source))
                    drops = [(expert, source), (other, gpu)]
                else:
                    continue
            if self._rules is None or self._rules.permits(home, adds, drops):
                state.apply(adds, drops)
