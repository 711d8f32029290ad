"""The fewest moves, proven layer by layer, for either split: `MinMoves` of the registry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from moeless_opt.problems.arrays import IntArray, SlotArray
from moeless_opt.problems.spec import Problem
from moeless_opt.solvers.core import Built, Heuristic, Task, check_engine, part_of, risk_L, token_bound
from moeless_opt.solvers.replan.even_counts import fewest_even_moves
from moeless_opt.solvers.replan.live import layer_moves, live_slots
from moeless_opt.solvers.replan.min_moves import min_moves, min_moves_bound
from moeless_opt.solvers.replan.relabel import seat
from moeless_opt.solvers.replan.solver import Replan, replan_within
from moeless_opt.solvers.replan.task import ReplanWish
from moeless_opt.solvers.shares import best_shares

__all__ = ["MinMoves", "MinMovesOptions"]

EXACT = 128
"""Experts x GPUs of a layer up to which an even split's moves are proven by the programme of pairs."""

ROUNDS = 8  # of destroying and repairing before it


@dataclass(frozen=True, slots=True, kw_only=True)
class MinMovesOptions:
    """How the programmes are solved.

    Parameters
    ----------
    engine : str
        "highs", "pulp", or "pulp:NAME" for one of PuLP's solvers.
        HiGHS through ortools, or PuLP's first available solver.
    """

    engine: str = "highs"

    def __post_init__(self) -> None:
        check_engine(self.engine)


class MinMoves(Heuristic):
    """The thorough re-plan, then the proof: the fewest replicas that must move for the wanted balance."""

    name = "min-moves"
    summary = "the fewest moves to the balance tolerance, proven layer by layer"
    Options = MinMovesOptions
    patience = 60.0

    def build(self, task: Task[MinMovesOptions]) -> Built:
        """Re-plan, then prove each layer's moves by a mixed-integer programme, as time allows."""
        if task.problem.split == "equal":
            return _even(task)
        problem, stop = task.problem, task.stop
        live_LGC, tolerance = live_slots(problem), problem.objective.balance_tolerance
        wish = ReplanWish(tolerance=tolerance, seed=task.seed, until_stopped=True)
        first = replan_within(problem, wish, stop=part_of(stop, 0.4))
        slots_LGC = first.slots_LGC
        wanted_L = np.maximum(token_bound(problem) * (1 + tolerance), risk_L(problem, slots_LGC))
        least_L = min_moves_bound(problem.load_LE, live_LGC, problem.topology.speed_G, wanted_L, close=True)
        inside_L = wanted_L <= first.target_L  # where the re-plan's own bounds speak of the same time
        least_L = np.maximum(least_L, np.where(inside_L, first.least_moves_L, 0))
        moves_L = layer_moves(problem, slots_LGC, live_LGC)
        proof = _Proof(task, slots_LGC, moves_L, least_L)

        def ask(layer: int, share: float) -> tuple[int, list[list[int]] | None]:
            answer = min_moves(
                problem.load_LE[layer],
                live_LGC[layer],
                problem.capacity_LG[layer],
                problem.topology.speed_G,
                float(wanted_L[layer]),
                known=[[e for e in row if e >= 0] for row in slots_LGC[layer].tolist()],
                stop=part_of(stop, share),
                engine=task.options.engine,
                least=int(least_L[layer]),
            )
            return answer.bound, answer.content

        return proof.close(ask)


def _even(task: Task[MinMovesOptions]) -> Built:
    """The same for an even split: small layers by the programme of pairs, others by that of counts."""
    problem, stop = task.problem, task.stop
    live_LGC = live_slots(problem)
    small = problem.experts * problem.topology.gpus <= EXACT  # the programme finds what a long search would
    options = {"rounds": ROUNDS} if small else {}
    first = Replan().placed(replace(task, stop=part_of(stop, 0.4)), problem, **options)
    slots_LGC = first.slots_LGC.copy()
    wanted_L = token_bound(problem) * (1 + problem.objective.balance_tolerance)
    wanted_L = np.maximum(wanted_L, risk_L(problem, slots_LGC))
    moves_L = layer_moves(problem, slots_LGC, live_LGC)
    proof = _Proof(task, slots_LGC, moves_L, np.zeros_like(moves_L))

    def ask(layer: int, share: float) -> tuple[int, list[list[int]] | None]:
        answer = fewest_even_moves(
            problem.load_LE[layer],
            live_LGC[layer],
            problem.capacity_LG[layer],
            problem.topology.speed_G,
            float(wanted_L[layer]),
            below=int(moves_L[layer]),
            exact=small,
            stop=part_of(stop, share),
            engine=task.options.engine,
        )
        return answer.bound, answer.content

    return proof.close(ask)


@dataclass(slots=True)
class _Proof:
    """Plans and bounds of all layers while they are brought together."""

    task: Task[MinMovesOptions]
    slots_LGC: SlotArray
    moves_L: IntArray
    least_L: IntArray

    def close(self, ask: Callable[[int, float], tuple[int, list[list[int]] | None]]) -> Built:
        """Prove the layers whose moves are above their bound, those with few moves first.

        Parameters
        ----------
        ask : callable
            From a layer and a share of the time left: a bound, and the contents of a plan if one is known.
        """
        problem, stop, report = self.task.problem, self.task.stop, self.task.report
        moves_L, least_L = self.moves_L, self.least_L
        live_LGC = live_slots(problem)
        open_L = sorted((int(x) for x in np.flatnonzero(moves_L > least_L)), key=lambda x: (moves_L[x], x))
        for done, layer in enumerate(open_L):
            if stop(float(moves_L.sum()), float(least_L.sum())):
                break
            bound, content = ask(layer, 1.0 / (len(open_L) - done))
            least_L[layer] = max(int(least_L[layer]), bound)
            if content is not None:
                slots_GC = np.array(
                    [seat(live.tolist(), row) for live, row in zip(live_LGC[layer], content, strict=True)],
                    dtype=self.slots_LGC.dtype,
                )
                moves = int(layer_moves(problem, slots_GC[None], live_LGC[layer][None])[0])
                if moves < moves_L[layer]:
                    self.slots_LGC[layer], moves_L[layer] = slots_GC, moves
            report(
                float(moves_L.sum()),
                float(least_L.sum()),
                done=(done + 1) / len(open_L),
                note=f"moves, layer {problem.loads.layers[layer]}",
            )
        return _told(problem, self.slots_LGC, moves_L, least_L)


def _told(problem: Problem, slots_LGC: SlotArray, moves_L: IntArray, least_L: IntArray) -> Built:
    proven = int((moves_L <= least_L).sum())
    text = (
        f"{int(moves_L.sum())} moves, at least {int(least_L.sum())} needed for this balance; "
        f"proven fewest in {proven} of {len(moves_L)} layers"
    )
    share_LGC = best_shares(problem, slots_LGC)
    return Built(slots_LGC=slots_LGC, share_LGC=share_LGC, message=text, proof=text)
