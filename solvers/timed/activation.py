"""Memory-bound decode: which replicas to use, when reading an expert costs more than its tokens.

With few tokens per expert a GPU's time follows the number of experts that it *activates*: all weights of
each are read, for one token or for thirty. A second replica in use is then a cost, not a relief. So every
expert uses one replica, and the placement decides only how freely it can be chosen.

*Fewest activated on the fullest GPU* is solved exactly. It is a semi-matching: take any choice, and hand
experts on along a path of GPUs (each has an expert that the next one holds too) from a fullest GPU to one
with room to spare. If no such path is left, the GPUs that it reaches can hand nothing out of their midst,
and they are full: that set is the proof, just as a minimum cut is for the usual binary search over maximum
flows. A search over eight GPUs instead of hundreds of experts takes microseconds.

*Then tokens*: among the choices that do not activate more, moves and swaps bring the largest token load
down (heuristic: this second step contains bin packing).

*All together*, ``time = launch + activation * activated + token * tokens``: a plan with equal split may hold
fewer replicas than fit (`worthwhile_replicas`), because each costs its activation. With free shares, `timed`
chooses which replicas to use.

Axes: L layers, E experts, G GPUs, C slots of a GPU.

References
----------
N. Harvey, R. Ladner, L. Lovász, T. Tamir, "Semi-matchings for bipartite graphs and load balancing",
J. Algorithms 59 (2006).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray, SlotArray
from moeless_opt.problems.errors import InfeasibleError
from moeless_opt.problems.plan import gpu_times
from moeless_opt.problems.spec import TimeModel, equal_shares

__all__ = ["Activation", "fewest_activated", "shares_of_one", "worthwhile_replicas"]


@dataclass(frozen=True, slots=True)
class Activation:
    """One replica for every expert that has tokens.

    Parameters
    ----------
    gpu_E : array of int, shape [E]
        The GPU that serves each expert, -1 if it has no tokens.
    activated_G : array of int, shape [G]
        Experts activated on each GPU.
    proof_G : array of bool, shape [G]
        GPUs that hold, alone, more experts with tokens than they could activate below
        ``max(activated / speed)``: the proof that no choice of replicas does better.
    """

    gpu_E: IntArray
    activated_G: IntArray
    proof_G: BoolArray


def fewest_activated(
    load_E: ArrayLike, slots_GC: ArrayLike, speed_G: ArrayLike | None = None, *, tokens: bool = True
) -> Activation:
    """Choose one replica per expert so that ``max(activated experts / speed)`` over GPUs is least, exactly.

    Parameters
    ----------
    load_E : array of float, shape [E]
        Tokens of each expert; an expert without tokens is not activated.
    slots_GC : array of int, shape [G, C]
        The placement, -1 in empty slots.
    speed_G : array of float, shape [G], optional
        Relative speeds (default 1).
    tokens : bool
        Whether to bring the largest token load down among the best choices.

    Returns
    -------
    Activation

    Raises
    ------
    InfeasibleError
        If an expert with tokens is on no GPU.
    """
    load = np.asarray(load_E, dtype=np.float64)
    slots = np.asarray(slots_GC)
    G = len(slots)
    board = _Board.open(
        load, slots, None if speed_G is None else np.asarray(speed_G, dtype=np.float64).tolist()
    )
    proof = board.level_counts()
    if tokens:
        board.level_tokens()
    gpu_E = np.where(load > 0, board.alone_E, -1)
    for expert, gpu in board.at.items():
        gpu_E[expert] = gpu
    proof_G = np.zeros(G, dtype=bool)
    proof_G[proof] = True
    return Activation(gpu_E, np.array(board.count), proof_G)


@dataclass(slots=True)
class _Board:
    """Where experts are served. Only those with tokens and a choice are handled one by one."""

    speed: list[float]
    alone_E: IntArray  # a GPU that holds each expert
    hosts: dict[int, list[int]]  # of each expert with a choice
    load: dict[int, float]
    at: dict[int, int]
    here: list[list[int]]  # experts with a choice, by GPU
    count: list[int]
    token: list[float]

    @classmethod
    def open(cls, load: FloatArray, slots: NDArray[np.integer], speed: list[float] | None) -> _Board:
        """Serve experts where they must be, then the others, heaviest first, where least is active."""
        E, (G, C) = len(load), slots.shape
        flat = slots.ravel()
        place = np.flatnonzero(flat >= 0)
        place = place[np.argsort(flat[place], kind="stable")]
        gpu = place // C
        copies_E = np.bincount(flat[place], minlength=E)
        first_E = copies_E.cumsum() - copies_E
        active_E = load > 0
        missing = np.flatnonzero(active_E & (copies_E == 0))
        if len(missing):
            raise InfeasibleError(f"expert {missing[0]} has {load[missing[0]]:g} tokens and is on no GPU")
        alone_E = np.full(E, -1)
        held = copies_E > 0
        alone_E[held] = gpu[first_E[held]]
        fixed = np.flatnonzero(active_E & (copies_E == 1))
        choice = np.flatnonzero(active_E & (copies_E > 1))
        choice = choice[np.argsort(-load[choice], kind="stable")]
        count = np.bincount(alone_E[fixed], minlength=G).tolist()
        token = np.bincount(alone_E[fixed], weights=load[fixed], minlength=G).tolist()
        gpus = gpu.tolist()
        start, copies = first_E[choice].tolist(), copies_E[choice].tolist()
        experts, loads = choice.tolist(), load[choice].tolist()
        hosts = {e: gpus[i : i + n] for e, i, n in zip(experts, start, copies, strict=True)}
        board = cls(
            [1.0] * G if speed is None else speed,
            alone_E,
            hosts,
            dict(zip(experts, loads, strict=True)),
            {},
            [[] for _ in range(G)],
            count,
            token,
        )
        speed = board.speed
        for e in experts:
            best, key = -1, (np.inf, np.inf)
            for g in hosts[e]:
                now = ((count[g] + 1) / speed[g], token[g] / speed[g])
                if now < key:
                    best, key = g, now
            board.at[e] = best
            board.here[best].append(e)
            count[best] += 1
            token[best] += board.load[e]
        return board

    def move(self, expert: int, to: int) -> None:
        """Serve an expert elsewhere."""
        source = self.at[expert]
        self.here[source].remove(expert)
        self.here[to].append(expert)
        self.at[expert] = to
        self.count[source] -= 1
        self.count[to] += 1
        self.token[source] -= self.load[expert]
        self.token[to] += self.load[expert]

    def level_counts(self) -> list[int]:
        """Hand experts on until the fullest GPU cannot; return the GPUs that prove it."""
        count, speed, hosts = self.count, self.speed, self.hosts
        while True:
            worst = max(n / s for n, s in zip(count, speed, strict=True))
            start = next(g for g, (n, s) in enumerate(zip(count, speed, strict=True)) if n / s == worst)
            came: dict[int, tuple[int, int]] = {start: (-1, -1)}  # GPU: (previous GPU, expert handed on)
            queue = [start]
            found = -1
            for g in queue:
                for e in self.here[g]:
                    for h in hosts[e]:
                        if h not in came:
                            came[h] = (g, e)
                            queue.append(h)
                            if (count[h] + 1) / speed[h] < worst:
                                found = h
                                break
                    if found >= 0:
                        break
                if found >= 0:
                    break
            if found < 0:
                return queue
            while found != start:
                previous, expert = came[found]
                self.move(expert, found)
                found = previous

    def level_tokens(self, rounds: int = 64) -> None:
        """Move and swap experts off the GPU with most tokens while no GPU activates more than the fullest."""
        count, speed, token, load = self.count, self.speed, self.token, self.load
        most = max(n / s for n, s in zip(count, speed, strict=True))
        for _ in range(rounds):
            time = [t / s for t, s in zip(token, speed, strict=True)]
            worst = max(time)
            g = time.index(worst)
            best, step = worst * (1 - 1e-12), None
            for e in self.here[g]:
                for h in self.hosts[e]:
                    if h == g:
                        continue
                    if (count[h] + 1) / speed[h] <= most:
                        after = max((token[g] - load[e]) / speed[g], (token[h] + load[e]) / speed[h])
                        if after < best:
                            best, step = after, (e, h, -1)
                    for f in self.here[h]:
                        if load[f] < load[e] and g in self.hosts[f]:
                            change = load[e] - load[f]
                            after = max((token[g] - change) / speed[g], (token[h] + change) / speed[h])
                            if after < best:
                                best, step = after, (e, h, f)
            if step is None:
                return
            self.move(step[0], step[1])
            if step[2] >= 0:
                self.move(step[2], g)


def shares_of_one(load_LE: ArrayLike, slots_LGC: ArrayLike, speed_G: ArrayLike | None = None) -> FloatArray:
    """Shares that use one replica of each expert, as `fewest_activated` chooses it, in every layer.

    Parameters
    ----------
    load_LE : array of float, shape [L, E]
        Tokens of each expert; one without tokens is served somewhere, too.
    slots_LGC : array of int, shape [L, G, C]
        The placement, -1 in empty slots.
    speed_G : array of float, shape [G], optional
        Relative speeds (default 1).

    Returns
    -------
    array of float, shape [L, G, C]
        1 where an expert is served, 0 elsewhere.
    """
    load, slots = np.asarray(load_LE, dtype=np.float64), np.asarray(slots_LGC)
    share_LGC = np.zeros(slots.shape)
    here_G1 = np.arange(slots.shape[1])[:, None]
    for layer, (load_E, slots_GC) in enumerate(zip(load, slots, strict=True)):
        gpu_E = fewest_activated(np.maximum(load_E, 1e-300), slots_GC, speed_G).gpu_E
        share_LGC[layer] = (slots_GC >= 0) & (gpu_E[np.maximum(slots_GC, 0)] == here_G1)
    return share_LGC


def worthwhile_replicas(
    load_LE: ArrayLike, capacity_LG: ArrayLike, speed_G: ArrayLike, time: TimeModel
) -> tuple[SlotArray, FloatArray]:
    """Choose how many replicas an equal split should have when each costs its activation.

    Parameters
    ----------
    load_LE : array of float, shape [L, E]
        Tokens of each expert.
    capacity_LG : array of int, shape [L, G]
        Slots.
    speed_G : array of float, shape [G]
        Relative speeds.
    time : TimeModel
        The time model, with a token cost above 0.

    Returns
    -------
    slots_LGC : array of int32, shape [L, G, C]
        The best placement found over all totals of replicas.
    time_L : array of float, shape [L]
        Its largest GPU time.

    Notes
    -----
    A replica of expert e with r of them weighs ``activation + token * w_e / r``, which is the token cost
    of an expert with ``w_e + r * activation / token`` tokens: the packing for tokens packs this too.
    """
    from moeless_opt.solvers.pack import apportion, pack, trim

    load = np.atleast_2d(np.asarray(load_LE, dtype=np.float64))
    capacity = np.asarray(capacity_LG, dtype=np.int64)
    speed = np.asarray(speed_G, dtype=np.float64)
    L, E = load.shape
    spare_L = np.minimum(capacity, E).sum(axis=1) - E
    best_L, best_LGC = (
        np.full(L, np.inf),
        np.full((L, capacity.shape[1], int(capacity.max())), -1, dtype=np.int32),
    )
    price = time.activation_cost / time.token_cost
    for part in np.unique(np.round(np.linspace(0, 1, 33) * spare_L.max(initial=0)).astype(np.int64)):
        total_L = E + np.minimum(part, spare_L)
        replicas = trim(load, apportion(load, total_L, (capacity > 0).sum(axis=1)[:, None]), capacity)
        slots = pack(load + replicas * price, replicas, capacity, speed)
        now_L = gpu_times(load, slots, equal_shares(slots, E), speed, time).max(axis=1)
        better = now_L < best_L * (1 - 1e-12)
        best_L = np.where(better, now_L, best_L)
        best_LGC[better, :, : slots.shape[2]] = slots[better]
    return best_LGC, best_L
