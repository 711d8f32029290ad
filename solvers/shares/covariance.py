"""One split for all scenarios, so that no GPU takes or strays much: the shares of least covariance risk.

A GPU's tokens are linear in its shares s of the experts, so over scenarios of weight p they are m's in the
mean and stray by ``sqrt(s'Cs) = |X s|``, with X the scenarios' deviations from the mean times sqrt(p)
(C = X'X). The largest ``(m's + sigma |X s|) / speed`` over the GPUs is convex in the shares. It is made least
by cutting planes: the norm is the largest of ``u'X s`` over the unit vectors u; a linear programme has it for
the u that were the largest at the shares looked at so far, which gives a lower bound and shares to look at
next. Only experts with several replicas have a choice, so the programmes are small, one for each layer.

Axes: L layers, E experts, G GPUs, C slots of a GPU, T scenarios, P pairs of an expert with several replicas
and a GPU that holds one.

References
----------
Kelley, "The cutting-plane method for solving convex programs", Journal of the SIAM 8 (1960).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeless_opt.problems.arrays import FloatArray, IntArray, SlotArray
from moeless_opt.problems.spec import without_copies
from moeless_opt.solvers.shares.flow import solve_shares

__all__ = ["covariance_shares"]

TIGHT = 1e-5
"""Relative distance from the least risk at which shares are good enough."""
ROUNDS = 40


def covariance_shares(
    load_TLE: FloatArray,
    slots_LGC: SlotArray,
    speed_G: FloatArray,
    weight_T: FloatArray | None,
    sigma: float,
) -> FloatArray:
    """Shares that make the largest mean and `sigma` deviations of a GPU's time least, shape [L, G, C].

    Parameters
    ----------
    load_TLE : array, shape [T, L, E]
        Tokens of every scenario.
    slots_LGC : array of int32, shape [L, G, C]
        Expert in each slot, -1 where empty. Second copies on a GPU get no share.
    speed_G : array, shape [G]
        Relative speeds.
    weight_T : array, shape [T], optional
        Weights of the scenarios, summing to 1; equal by default.
    sigma : float
        How many standard deviations.
    """
    count = len(load_TLE)
    weight_T = np.full(count, 1 / count) if weight_T is None else weight_T
    mean_LE = np.einsum("t,tle->le", weight_T, load_TLE)
    share_LGC = solve_shares(mean_LE, slots_LGC, speed_G).share_LGC.copy()
    alone_LGC = without_copies(slots_LGC)
    apart_TLE = (load_TLE - mean_LE) * np.sqrt(weight_T)[:, None, None] * sigma
    for row, slots_GC in enumerate(alone_LGC):
        scale = float(mean_LE[row].sum() / speed_G.sum())
        if scale > 0 and apart_TLE[:, row].any():
            layer = _Layer.of(mean_LE[row] / scale, apart_TLE[:, row] / scale, slots_GC, speed_G)
            layer.settle(share_LGC[row])
    return share_LGC


@dataclass(slots=True, eq=False)
class _Layer:
    """A layer in units of its mean: what GPUs have anyway, and what each pair adds with all of its expert."""

    mean0_G: FloatArray
    apart0_TG: FloatArray
    mean_P: FloatArray
    apart_TP: FloatArray
    gpu_P: IntArray
    slot_P: IntArray
    group_P: IntArray  # which expert, numbered from 0
    speed_G: FloatArray

    @classmethod
    def of(cls, mean_E: FloatArray, apart_TE: FloatArray, slots_GC: SlotArray, speed_G: FloatArray) -> _Layer:
        gpu, slot = np.nonzero(slots_GC >= 0)
        expert = slots_GC[gpu, slot].astype(np.int64)
        several = np.bincount(expert, minlength=len(mean_E))[expert] > 1
        single = ~several
        mean0_G, apart0_TG = np.zeros(len(speed_G)), np.zeros((len(apart_TE), len(speed_G)))
        np.add.at(mean0_G, gpu[single], mean_E[expert[single]])
        np.add.at(apart0_TG.T, gpu[single], apart_TE[:, expert[single]].T)
        _, group_P = np.unique(expert[several], return_inverse=True)
        return cls(
            mean0_G=mean0_G,
            apart0_TG=apart0_TG,
            mean_P=mean_E[expert[several]],
            apart_TP=apart_TE[:, expert[several]],
            gpu_P=gpu[several],
            slot_P=slot[several],
            group_P=group_P.reshape(-1),
            speed_G=speed_G,
        )

    def times(self, share_P: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Mean and deviations of every GPU over its speed [G], and the way in which it strays [T, G]."""
        mean_G, apart_TG = self.mean0_G.copy(), self.apart0_TG.copy()
        np.add.at(mean_G, self.gpu_P, self.mean_P * share_P)
        np.add.at(apart_TG.T, self.gpu_P, (self.apart_TP * share_P).T)
        norm_G = np.sqrt((apart_TG**2).sum(0))
        return (mean_G + norm_G) / self.speed_G, apart_TG / np.maximum(norm_G, 1e-300)

    def settle(self, share_GC: FloatArray) -> None:
        """Replace shares by those of least risk, in place, where they are better."""
        if not len(self.gpu_P):
            return
        from ortools.linear_solver import pywraplp

        solver = pywraplp.Solver("shares", pywraplp.Solver.GLOP_LINEAR_PROGRAMMING)
        top = solver.NumVar(0.0, solver.infinity(), "")
        share = [solver.NumVar(0.0, 1.0, "") for _ in self.gpu_P]
        for group in range(int(self.group_P.max()) + 1):
            row = solver.Constraint(1.0, 1.0)
            for p in np.flatnonzero(self.group_P == group).tolist():
                row.SetCoefficient(share[p], 1.0)
        solver.Objective().SetCoefficient(top, 1.0)
        solver.Objective().SetMinimization()
        held_G = [np.flatnonzero(self.gpu_P == gpu).tolist() for gpu in range(len(self.speed_G))]

        def cut(gpu: int, way_T: FloatArray) -> None:
            most = float(self.mean0_G[gpu] + way_T @ self.apart0_TG[:, gpu])
            row = solver.Constraint(-solver.infinity(), -most)
            row.SetCoefficient(top, -float(self.speed_G[gpu]))
            for p in held_G[gpu]:
                row.SetCoefficient(share[p], float(self.mean_P[p] + way_T @ self.apart_TP[:, p]))

        best_P = share_GC[self.gpu_P, self.slot_P]
        time_G, way_TG = self.times(best_P)
        best = float(time_G.max())
        for gpu in range(len(time_G)):
            cut(gpu, way_TG[:, gpu])
        for _ in range(ROUNDS):
            if solver.Solve() != pywraplp.Solver.OPTIMAL:
                break
            low = float(top.solution_value())
            if best <= low * (1 + TIGHT):
                break
            now_P = np.maximum([one.solution_value() for one in share], 0.0)
            now_P /= np.bincount(self.group_P, now_P)[self.group_P]
            for look_P in (now_P, (now_P + best_P) / 2):
                time_G, way_TG = self.times(look_P)
                for gpu in np.flatnonzero(time_G > low * (1 + TIGHT / 2)).tolist():
                    cut(gpu, way_TG[:, gpu])
                if float(time_G.max()) < best:
                    best, best_P = float(time_G.max()), look_P
        share_GC[self.gpu_P, self.slot_P] = best_P
