"""Exact token shares on a fixed placement: one small persistent linear programme per layer.

With the placement fixed, only the split of each expert's tokens over its replicas is free. Minimising
the largest GPU time is the linear programme

    min T   subject to   sum_g y[e,g] = w[e],   sum_e y[e,g] <= speed[g] T,   y >= 0 on the replicas.

An expert with a single replica has no choice: its load is folded into a constant per GPU, so the
programme holds only replicated experts. Between calls the model stays alive in GLOP: new loads change
row bounds, a moved replica changes a variable's bound, and the last basis warm-starts the next solve.

The duals are prices of GPU time: ``price_G @ speed_G == 1`` and ``T* = sum_e w[e] min over e's GPUs of
price``. Each level set of the prices is a set S of GPUs whose captive load, that of the experts with all
replicas inside S, divided by its speed equals T*. That is a proof of optimality that needs no
solver: see `density`, and maximum-density subgraphs in Goldberg (1984), "Finding a maximum density
subgraph", and Picard and Queyranne (1982).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeless_opt.problems.errors import ProblemError, SolverUnavailableError
from moeless_opt.problems.plan.evaluate import gpu_times

Floats = NDArray[np.float64]
Slots = NDArray[np.int32]

# Upper bound on the tokens of a live replica. With a large finite number GLOP ran for ever on some loads.
_ON = float("inf")
# Presolve would cost more than the few pivots of a warm start.
_WARM = "use_dual_simplex:true use_preprocessing:false max_number_of_iterations:500"
_COLD = "use_dual_simplex:true max_number_of_iterations:100000 use_preprocessing:true"
_COLD_PRIMAL = "use_dual_simplex:false max_number_of_iterations:100000"
_LEVELS = 8  # distinct price levels examined for the certificate


def density(load_E: Floats, slots_GC: NDArray[Any], speed_G: Floats, gpu_set: Sequence[int]) -> float:
    """Captive load of a set of GPUs over its speed: a lower bound on the layer's time, whatever the shares.

    Parameters
    ----------
    load_E : float array [experts]
        Tokens of each expert.
    slots_GC : int array [GPUs, slots]
        Expert in each slot, -1 where empty.
    speed_G : float array [GPUs]
        Relative speeds, positive.
    gpu_set : sequence of int
        The GPUs of the set, at least one.

    Returns
    -------
    float
        Sum of the loads of the experts whose replicas all lie inside the set, divided by the sum of
        the set's speeds. Those tokens have nowhere else to go, so no split is faster than this.

    Notes
    -----
    The maximum over all sets equals the optimal time (LP duality), so a split and a set with the same
    figure prove each other.
    """
    inside_G = np.zeros(len(slots_GC), dtype=bool)
    inside_G[list(gpu_set)] = True
    if not inside_G.any():
        raise ProblemError("gpu_set", "is empty, would need at least one GPU")
    hosted_E = np.zeros(len(load_E), dtype=bool)
    escapes_E = np.zeros(len(load_E), dtype=bool)
    inner_GC, outer_GC = slots_GC[inside_G], slots_GC[~inside_G]
    hosted_E[inner_GC[inner_GC >= 0]] = True
    escapes_E[outer_GC[outer_GC >= 0]] = True
    return float(load_E[hosted_E & ~escapes_E].sum() / speed_G[inside_G].sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareSolution:
    """Optimal shares of one layer, with the dual proof.

    Attributes
    ----------
    time : float
        Optimal largest GPU time (tokens over speed).
    share_GC : float array [GPUs, slots]
        Fraction of its expert's tokens that each slot serves; an expert's shares sum to 1.
    price_G : float array [GPUs]
        Dual price of each GPU's time; zero where the GPU is not critical.
    time_G : float array [GPUs]
        GPU times under these shares.
    critical : tuple of int
        GPUs of maximum density: ``density(load_E, slots_GC, speed_G, critical)`` equals `time`.
    bound : float
        That density. ``time - bound`` is the proven gap (rounding only).
    """

    time: float
    share_GC: Floats
    price_G: Floats
    time_G: Floats
    critical: tuple[int, ...]
    bound: float


class ShareLP:
    """Persistent exact share solver of one layer's placement.

    Parameters
    ----------
    slots_GC : int array [GPUs, slots]
        Expert in each slot, -1 where empty. Copied; moves go through `add` and `remove`.
    speed_G : float array [GPUs]
        Relative speeds, positive.
    experts : int
        Number of experts in the layer.

    Raises
    ------
    ProblemError
        An expert has no replica, or two replicas on one GPU.
    SolverUnavailableError
        ortools was built without GLOP.

    Examples
    --------
    >>> import numpy as np
    >>> lp = ShareLP(np.array([[0, 1], [1, 2]], dtype=np.int32), np.ones(2), 3)
    >>> lp.solve(np.array([6.0, 4.0, 2.0])).time
    6.0
    """

    def __init__(self, slots_GC: NDArray[Any], speed_G: Floats, experts: int) -> None:
        from ortools.linear_solver import pywraplp

        solver = pywraplp.Solver.CreateSolver("GLOP")
        if solver is None:
            raise SolverUnavailableError("GLOP is missing from this build of ortools")
        solver.SetSolverSpecificParametersAsString(_WARM)
        self._solver: Any = solver
        self._optimal = pywraplp.Solver.OPTIMAL
        self._cold = pywraplp.MPSolverParameters()
        self._cold.SetIntegerParam(self._cold.INCREMENTALITY, self._cold.INCREMENTALITY_OFF)
        self._infinity = solver.infinity()
        self.slots_GC: Slots = np.array(slots_GC, dtype=np.int32)
        self.speed_G: Floats = np.array(speed_G, dtype=np.float64)
        self._home_E: list[list[int]] = [[] for _ in range(experts)]
        for gpu, row in enumerate(self.slots_GC.tolist()):
            for expert in row:
                if expert >= 0:
                    if gpu in self._home_E[expert]:
                        raise ProblemError(
                            f"slots_GC[{gpu}]", f"holds expert {expert} twice, would be one replica"
                        )
                    self._home_E[expert].append(gpu)
        for expert, home in enumerate(self._home_E):
            if not home:
                raise ProblemError("slots_GC", f"expert {expert} has no replica, would need at least one")
        self._time = solver.NumVar(0.0, self._infinity, "")
        solver.Objective().SetCoefficient(self._time, 1.0)
        solver.Objective().SetMinimization()
        self._gpu_rows = [solver.Constraint(-self._infinity, 0.0) for _ in range(len(self.speed_G))]
        for row, speed in zip(self._gpu_rows, self.speed_G.tolist(), strict=True):
            row.SetCoefficient(self._time, -speed)
        self._expert_rows: dict[int, Any] = {}
        # What follows from the placement, made when needed: experts outside the programme and their GPUs,
        # and the slots of the replicas inside it.
        self._singles: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None
        self._slot_of: dict[tuple[int, int], int] | None = None
        self._pairs: dict[tuple[int, int], Any] = {}
        for expert, home in enumerate(self._home_E):
            if len(home) > 1:
                self._open(expert)

    @property
    def home_E(self) -> list[list[int]]:
        """GPUs that hold each expert (live view: do not change)."""
        return self._home_E

    def _open(self, expert: int) -> None:
        """Bring an expert into the programme, with a variable for each of its replicas."""
        self._singles = self._slot_of = None
        if expert not in self._expert_rows:
            self._expert_rows[expert] = self._solver.Constraint(0.0, 0.0)
        for gpu in self._home_E[expert]:
            pair = self._pairs.get((expert, gpu))
            if pair is None:
                pair = self._solver.NumVar(0.0, _ON, "")
                self._expert_rows[expert].SetCoefficient(pair, 1.0)
                self._gpu_rows[gpu].SetCoefficient(pair, 1.0)
                self._pairs[expert, gpu] = pair
            else:
                pair.SetUb(_ON)

    def add(self, expert: int, gpu: int) -> None:
        """Put a replica of an expert into an empty slot of a GPU.

        Raises
        ------
        ProblemError
            The GPU is full or already holds the expert.
        """
        if gpu in self._home_E[expert]:
            raise ProblemError(f"slots_GC[{gpu}]", f"already holds expert {expert}")
        empty = np.flatnonzero(self.slots_GC[gpu] < 0)
        if not len(empty):
            raise ProblemError(f"slots_GC[{gpu}]", f"has no empty slot for expert {expert}")
        self.slots_GC[gpu, empty[0]] = expert
        self._home_E[expert].append(gpu)
        self._home_E[expert].sort()
        self._open(expert)

    def remove(self, expert: int, gpu: int) -> None:
        """Drop a replica; the GPU's last filled slot moves into its place.

        Raises
        ------
        ProblemError
            The GPU does not hold the expert, or it is the expert's last replica.
        """
        self._singles = self._slot_of = None
        home = self._home_E[expert]
        if gpu not in home:
            raise ProblemError(f"slots_GC[{gpu}]", f"holds no replica of expert {expert}")
        if len(home) == 1:
            raise ProblemError(f"slots_GC[{gpu}]", f"holds the last replica of expert {expert}")
        row_C = self.slots_GC[gpu]
        slot = int(np.flatnonzero(row_C == expert)[0])
        last = int(np.flatnonzero(row_C >= 0)[-1])
        row_C[slot] = row_C[last]
        row_C[last] = -1
        home.remove(gpu)
        self._pairs[expert, gpu].SetUb(0.0)

    def swap(self, expert: int, gpu: int, other: int, other_gpu: int) -> None:
        """Exchange a replica of `expert` on `gpu` with one of `other` on `other_gpu`."""
        if gpu in self._home_E[other] or other_gpu in self._home_E[expert]:
            raise ProblemError("swap", f"of experts {expert} and {other} would put two replicas on one GPU")
        self._singles = self._slot_of = None
        for moved, source, target in ((expert, gpu, other_gpu), (other, other_gpu, gpu)):
            self.slots_GC[source, int(np.flatnonzero(self.slots_GC[source] == moved)[0])] = -2 - moved
            self._home_E[moved].remove(source)
            self._home_E[moved].append(target)
            self._home_E[moved].sort()
        self.slots_GC[gpu][self.slots_GC[gpu] == -2 - expert] = other
        self.slots_GC[other_gpu][self.slots_GC[other_gpu] == -2 - other] = expert
        for moved, source in ((expert, gpu), (other, other_gpu)):
            pair = self._pairs.get((moved, source))
            if pair is not None:
                pair.SetUb(0.0)
            if moved in self._expert_rows:
                self._open(moved)

    def solve(self, load_E: Floats) -> ShareSolution:
        """Split the given loads optimally.

        Parameters
        ----------
        load_E : float array [experts]
            Tokens of each expert, not negative.

        Returns
        -------
        ShareSolution
            Optimal time, shares, prices and certificate.
        """
        price_G, token = self._run(load_E)
        share_GC = self._shares(load_E, token)
        time_G = gpu_times(load_E[None], self.slots_GC[None], share_GC[None], self.speed_G)[0]
        critical, bound = critical_set(
            load_E, self.slots_GC, self.speed_G, price_G, enough=float(time_G.max()) * (1.0 - 1e-12)
        )
        return ShareSolution(
            time=float(time_G.max()),
            share_GC=share_GC,
            price_G=price_G,
            time_G=time_G,
            critical=critical,
            bound=bound,
        )

    def time(self, load_E: Floats) -> float:
        """Only the optimal time: for search loops that try many moves."""
        self._bind(load_E)
        return float(self._time.solution_value()) * self._unit

    def prices(self, load_E: Floats) -> tuple[float, Floats]:
        """Optimal time and GPU prices, without shares or certificate."""
        self._bind(load_E)
        return float(self._time.solution_value()) * self._unit, self._read_prices()

    def _run(self, load_E: Floats) -> tuple[Floats, dict[tuple[int, int], float]]:
        self._bind(load_E)
        return self._read_prices(), {key: pair.solution_value() for key, pair in self._pairs.items()}

    def _read_prices(self) -> Floats:
        price_G = np.array([max(0.0, -row.dual_value()) for row in self._gpu_rows])
        total = float(price_G @ self.speed_G)
        return price_G / total if total > 0.0 else np.full(len(price_G), 1.0 / self.speed_G.sum())

    def _bind(self, load_E: Floats) -> None:
        """Write the loads into the row bounds and solve from the last basis."""
        # Loads in units of the mean GPU load: GLOP's tolerances are absolute.
        self._unit = float(load_E.sum() / self.speed_G.sum()) or 1.0
        load = (load_E / self._unit).tolist()
        for expert, row in self._expert_rows.items():
            row.SetBounds(load[expert], load[expert])
        if self._singles is None:
            singles = [e for e in range(len(self._home_E)) if e not in self._expert_rows]
            gpus = [self._home_E[e][0] for e in singles]
            self._singles = np.array(singles, dtype=np.int64), np.array(gpus, dtype=np.int64)
        expert_S, gpu_S = self._singles
        base_G = np.bincount(gpu_S, weights=load_E[expert_S], minlength=len(self._gpu_rows)) / -self._unit
        for row, room in zip(self._gpu_rows, base_G.tolist(), strict=True):
            row.SetUb(room)
        if self._solver.Solve() == self._optimal:
            return
        # Should a warm start cycle on degenerate loads, the cap on iterations ends it: solve from scratch.
        for retry in (_COLD, _COLD_PRIMAL):
            self._solver.SetSolverSpecificParametersAsString(retry)
            status = self._solver.Solve(self._cold)
            self._solver.SetSolverSpecificParametersAsString(_WARM)
            if status == self._optimal:
                return
        raise SolverUnavailableError("GLOP ended a share programme without an optimum")

    def _shares(self, load_E: Floats, token: dict[tuple[int, int], float]) -> Floats:
        if self._slot_of is None:
            self._slot_of = {
                (expert, gpu): slot
                for gpu, row in enumerate(self.slots_GC.tolist())
                for slot, expert in enumerate(row)
                if expert in self._expert_rows
            }
        share_GC = np.where(self.slots_GC >= 0, 1.0, 0.0)
        for expert in self._expert_rows:
            home = self._home_E[expert]
            part = [max(0.0, token[expert, gpu]) for gpu in home]
            total = sum(part)
            for gpu, value in zip(home, part, strict=True):
                share_GC[gpu, self._slot_of[expert, gpu]] = value / total if total > 0.0 else 1.0 / len(home)
        return share_GC


def critical_set(
    load_E: Floats,
    slots_GC: NDArray[Any],
    speed_G: Floats,
    price_G: Floats,
    *,
    enough: float = float("inf"),
) -> tuple[tuple[int, ...], float]:
    """Densest level set of the prices: with exact prices, a set that proves the optimum.

    Parameters
    ----------
    load_E, slots_GC, speed_G : array
        As for `density`.
    price_G : float array [GPUs]
        Dual prices.
    enough : float
        A density to be content with: no further set is tried.

    Returns
    -------
    tuple of int, float
        The GPUs, ascending, and their density.
    """
    best: tuple[tuple[int, ...], float] = ((), -1.0)
    top = float(price_G.max())
    levels = sorted({round(float(price) / top, 9) for price in price_G}, reverse=True) if top > 0.0 else [0.0]
    positive = [level for level in levels if level > 1e-9] or [0.0]
    for level in [*positive[:_LEVELS], positive[-1], 0.0]:
        chosen = np.flatnonzero(price_G >= (level - 1e-9) * top)
        value = density(load_E, slots_GC, speed_G, chosen.tolist())
        if value > best[1] * (1.0 + 1e-12):
            best = (tuple(int(gpu) for gpu in chosen), value)
            if value >= enough:
                break
    return best


def solve_shares_exact(
    load_LE: Floats, slots_LGC: NDArray[Any], speed_G: Floats
) -> tuple[Floats, Floats, list[tuple[int, ...]]]:
    """Optimal shares of every layer by linear programming, with certificates.

    Parameters
    ----------
    load_LE : float array [layers, experts]
        Tokens.
    slots_LGC : int array [layers, GPUs, slots]
        Expert in each slot, -1 where empty.
    speed_G : float array [GPUs]
        Relative speeds.

    Returns
    -------
    share_LGC : float array [layers, GPUs, slots]
        Optimal shares.
    time_L : float array [layers]
        Optimal times.
    critical : list of tuple of int
        A densest GPU set per layer.
    """
    found = [
        ShareLP(slots_GC, speed_G, load_LE.shape[1]).solve(load_E)
        for load_E, slots_GC in zip(load_LE, slots_LGC, strict=True)
    ]
    share_LGC = np.array([one.share_GC for one in found])
    return share_LGC, np.array([one.time for one in found]), [one.critical for one in found]
