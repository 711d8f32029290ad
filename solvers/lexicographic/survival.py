"""Survival as a priority: which failures are to lose no expert, and placements in which they lose none.

What a placement survives depends on the sets of failure domains that its experts are on, and of these on the
smallest: failures lose an expert exactly if they take all of such a set. So the sets come first (*bases*):
few, large, and with room for an expert each. Of up to five domains a programme finds the best; of more, the
best of those that part the domains, by dynamic programming over domains in order of their room (equal pods
are best where all rooms are equal: Lazarus' maximum rank overlap). Layers have the same bases, since
failures strike all layers at once. Every expert then goes to a base, and what room is left serves balance.

With several layers the figure of a layer counts the failures that are *watched* alone: those that all layers
together are to survive. A layer that loses no more than others do anyway is as good as one without losses.

References
----------
Wu et al., "Lazarus: Resilient and Elastic Training of Mixture-of-Experts Models with Adaptive Expert
Placement" (2024), arXiv 2407.04656.

Axes: F sets of failed domains, D domains, L layers, E experts, G GPUs, B bases.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray, SlotArray
from moeless_opt.problems.plan import failure_sets, lost_sets
from moeless_opt.problems.spec import Problem, held_LGE
from moeless_opt.solvers.core import LinearModel, Stop, solve_linear
from moeless_opt.solvers.pack import improve

__all__ = ["Base", "Failures", "families", "loss_bound", "on_bases"]

_PROVEN = 5  # domains up to which a programme finds the bases


class Failures:
    """What failures cost, by layer, and which of them are watched.

    Parameters
    ----------
    problem : Problem
        With several failure domains.
    """

    def __init__(self, problem: Problem) -> None:
        self.experts = problem.experts
        self.sets = failure_sets(problem)
        self.coupled = problem.layers > 1
        """Whether layers share their losses."""
        self.watched_F: BoolArray = np.ones(len(self.sets.chance_F), dtype=np.bool_)

    @property
    def weight_F(self) -> FloatArray:
        """What the loss by each failure costs, shape [F]; the same for all layers."""
        return np.where(self.watched_F, self.sets.chance_F, 0.0)

    def figure_L(self, slots_LGC: SlotArray) -> FloatArray:
        """Probability of a loss in each layer by failures that are watched, shape [L]."""
        return np.asarray(lost_sets(self.sets, slots_LGC, self.experts) @ self.weight_F)

    def lost_F(self, slots_LGC: SlotArray) -> BoolArray:
        """Failures that lose an expert of any of these layers, shape [F]."""
        return np.asarray(lost_sets(self.sets, slots_LGC, self.experts).any(0))

    def chance(self, lost_F: BoolArray) -> float:
        """Probability of any of some failures."""
        return float(self.sets.chance_F[lost_F].sum())

    def settle(self, slots_LGC: SlotArray) -> None:
        """From now on no failure that these layers together survive may lose an expert of any."""
        if self.coupled:
            self.watched_F = ~self.lost_F(slots_LGC)


@dataclass(frozen=True, slots=True)
class Base:
    """A set of domains all of which hold the same experts, and how many of these fit.

    Parameters
    ----------
    domains : tuple of int
        Domains by their place among those of `FailureSets`.
    room : int
        Experts.
    """

    domains: tuple[int, ...]
    room: int


def _rooms(problem: Problem, domain_G: IntArray) -> IntArray:
    """Different experts that each domain has room for, shape [L, D]."""
    capacity_LG = np.minimum(problem.capacity_LG, problem.experts)
    domains = int(domain_G.max()) + 1
    return np.stack(
        [np.minimum(capacity_LG[:, domain_G == d].sum(1), problem.experts) for d in range(domains)], axis=1
    )


def families(problem: Problem, failures: Failures, order: Sequence[str], stop: Stop) -> Iterator[list[Base]]:
    """Bases with room for all experts in every layer, least probability of a loss first.

    Where balance comes before survival, also such as leave a part of the slots to it; where memory does, also
    single domains.
    """
    before = order[: order.index("survival")]
    room_D = _rooms(problem, failures.sets.domain_G).min(0)
    most = problem.limits.max_replicas or len(room_D)
    wanted = [(room_D, most)]
    if "balance" in before:
        wanted += [(room_D - room_D // part, most) for part in (16, 8, 4)]
    if "memory" in before:
        wanted.append((room_D, 1))
    for room, size in wanted:
        if found := _bases(problem, failures, room, size, stop):
            yield found


def _bases(problem: Problem, failures: Failures, room_D: IntArray, most: int, stop: Stop) -> list[Base]:
    if len(room_D) <= _PROVEN:
        found = _best_bases(problem, failures, room_D, most, stop)[0]
        if found:
            return found
    return _parted(room_D, problem.experts, problem.objective.failure_rate, most)


def loss_bound(problem: Problem, failures: Failures, stop: Stop) -> float:
    """No placement has a smaller probability of a loss: by slots alone, whatever limits say."""
    sets, rate = failures.sets, problem.objective.failure_rate
    domains = sets.gone_FD.shape[1]
    best = 0.0
    for room_D in np.unique(_rooms(problem, sets.domain_G), axis=0):
        if domains <= _PROVEN:
            best = max(best, _best_bases(problem, failures, room_D, domains, stop)[1])
        # As many experts are on just the same domains as one of these has room for, so every expert stands
        # for its part of a set; their mean size is given by the slots, and larger ones fail ever more seldom.
        parts = problem.experts / int(room_D.max())
        size = min(int(room_D.sum()) / problem.experts, float(domains))
        at = int(size)
        alone, more = (rate**k * (1 - rate) ** (domains - k) for k in (at, at + 1))
        most = int(sets.gone_FD.sum(1).max())
        if at < most and (rate <= 1 / 3 or most == domains):  # else sets beyond those looked at bend it
            best = max(best, parts * (alone + (size - at) * (more - alone)))
    return best * (1 - 1e-9) + sets.beyond


def _best_bases(
    problem: Problem, failures: Failures, room_D: IntArray, most: int, stop: Stop
) -> tuple[list[Base], float]:
    """The best bases of few domains by a programme, and a bound on the probability of a loss.

    ``n[S]`` experts are on just the domains S, ``y[S] = 1`` if any are; ``lost[F] >= y[S]`` where F takes S.
    """
    sets, experts = failures.sets, problem.experts
    domains = len(room_D)
    unit = float(sets.chance_F.max())
    model, room_rows = LinearModel(), [list[tuple[int, float]]() for _ in range(domains)]
    lost = [
        model.variable(0, 1, name=f"lost_{row}", cost=chance / unit)
        for row, chance in enumerate(sets.chance_F)
    ]
    count: dict[tuple[int, ...], int] = {}
    for size in range(1, min(most, domains) + 1):
        for members in combinations(range(domains), size):
            fits = min(int(room_D[list(members)].min()), experts)
            if not fits:
                continue
            name = "_".join(map(str, members))
            on = model.variable(0, fits, whole=True, name=f"n_{name}")
            used = model.variable(0, 1, whole=True, name=f"y_{name}")
            model.row([(on, 1.0), (used, -float(fits))], -np.inf, 0.0)
            for row in np.flatnonzero(sets.gone_FD[:, list(members)].all(1)).tolist():
                model.row([(used, 1.0), (lost[row], -1.0)], -np.inf, 0.0)
            count[members] = on
            for domain in members:
                room_rows[domain].append((on, 1.0))
    model.row([(v, 1.0) for v in count.values()], experts, experts)
    for row_D, room in zip(room_rows, room_D.tolist(), strict=True):
        if row_D:
            model.row(row_D, -np.inf, room)
    model.cost += [0.0] * (len(model.names) - len(model.cost))
    found = solve_linear(model, stop=stop, gap=1e-9)
    bound = max(found.bound, 0.0) * unit if np.isfinite(found.bound) else 0.0
    if found.value_V is None:
        return [], bound
    bases = [Base(members, round(float(found.value_V[v]))) for members, v in count.items()]
    return [base for base in bases if base.room], bound


def _parted(room_D: IntArray, experts: int, rate: float, most: int) -> list[Base]:
    """Bases that share no domain, the least probability that one of them fails; none if there are none.

    Domains in order of their room: a base has room for what its smallest has, so like ones go together.
    """
    order = np.argsort(-room_D, kind="stable")
    room = room_D[order].tolist()
    domains = len(room)
    cost = np.full((domains + 1, experts + 1), np.inf)  # [domains that were looked at, experts with a base]
    cost[0, 0] = 0.0
    taken = np.zeros((domains + 1, experts + 1), dtype=np.int64)  # domains of the last base, 0: passed over
    came = np.zeros((domains + 1, experts + 1), dtype=np.int64)  # experts before it
    index = np.arange(experts + 1)
    for end in range(1, domains + 1):
        cost[end], came[end] = cost[end - 1], index
        for size in range(1, min(end, most) + 1):
            if not room[end - 1]:
                break
            then = np.minimum(index + room[end - 1], experts)
            value = cost[end - size] + rate**size
            order_E = np.argsort(-value, kind="stable")  # where several end alike, the cheapest comes last
            best = np.full(experts + 1, np.inf)
            before = np.zeros(experts + 1, dtype=np.int64)
            best[then[order_E]], before[then[order_E]] = value[order_E], order_E
            better = best < cost[end]
            cost[end][better], taken[end][better], came[end][better] = best[better], size, before[better]
    bases: list[Base] = []
    if not np.isfinite(cost[domains, experts]):
        return bases
    end, left = domains, experts
    while end:
        size, before_E = int(taken[end, left]), int(came[end, left])
        if size:
            members = tuple(sorted(order[end - size : end].tolist()))
            bases.append(Base(members, room[end - 1]))
        end, left = end - max(size, 1), before_E
    return bases[::-1]


def on_bases(
    problem: Problem, failures: Failures, bases: list[Base], *, moves: bool
) -> Iterator[tuple[SlotArray, ...]]:
    """Every layer with its experts on bases: (one replica in each domain, and with all slots in use).

    With `moves` experts go to bases of which they are on most domains; else to the one with least to do.
    """
    live_LGE = None if problem.current is None else held_LGE(problem.current.slots_LGC, problem.experts)
    forbidden_LEG = problem.pairs_LEG("forbidden")
    domain_G, speed_G = failures.sets.domain_G, problem.topology.speed_G
    for layer, load_E in enumerate(problem.load_LE):
        state = _Layer(load_E, problem.capacity_LG[layer], speed_G, domain_G, forbidden_LEG[layer])
        live_EG = np.zeros((problem.experts, len(speed_G)), dtype=np.bool_)
        if live_LGE is not None:
            live_EG = live_LGE[layer].T
        state.place(bases, live_EG, moves)
        lean_GC = state.slots(int(problem.capacity_LG.max()))
        state.fill()
        state.even_out()
        yield lean_GC, state.slots(int(problem.capacity_LG.max()))


class _Layer:
    """One layer under construction, heaviest experts first."""

    def __init__(
        self,
        load_E: FloatArray,
        capacity_G: IntArray,
        speed_G: FloatArray,
        domain_G: IntArray,
        forbidden_EG: BoolArray,
    ) -> None:
        self.load_E, self.speed_G, self.domain_G = load_E, speed_G, domain_G
        self.forbidden_EG = forbidden_EG
        self.room_G = np.minimum(capacity_G, len(load_E)).copy()
        self.time_G = np.zeros(len(speed_G))
        self.held_EG = np.zeros((len(load_E), len(speed_G)), dtype=np.bool_)

    def place(self, bases: list[Base], live_EG: BoolArray, moves: bool) -> None:
        """Every expert on all domains of a base, as far as pairs are not forbidden."""
        left_B = np.array([base.room for base in bases])
        speed_B = np.array([self.speed_G[np.isin(self.domain_G, base.domains)].sum() for base in bases])
        work_B = np.zeros(len(bases))
        domains = int(self.domain_G.max()) + 1
        live_ED = np.stack([live_EG[:, self.domain_G == d].any(1) for d in range(domains)], axis=1)
        stays_EB = np.stack([live_ED[:, list(base.domains)].sum(1) for base in bases], axis=1)
        order = np.argsort(-self.load_E, kind="stable").tolist()
        if moves:  # who would lose most by another base chooses first
            order.sort(key=lambda e: -int(stays_EB[e].max()))
        for expert in order:
            key_B = np.where(left_B > 0, (work_B + self.load_E[expert]) / speed_B, np.inf)
            if moves:
                most = stays_EB[expert][left_B > 0].max()
                key_B = np.where(stays_EB[expert] == most, key_B, np.inf)
            at = int(key_B.argmin())
            left_B[at] -= 1
            work_B[at] += self.load_E[expert]
            for domain in bases[at].domains:
                self._put(expert, domain, live_EG[expert], self.load_E[expert] / len(bases[at].domains))

    def _put(self, expert: int, domain: int, live_G: BoolArray, tokens: float) -> None:
        open_G = (self.domain_G == domain) & (self.room_G > 0) & ~self.forbidden_EG[expert]
        if not open_G.any():
            return
        if (open_G & live_G).any():
            open_G &= live_G
        gpu = int(np.where(open_G, self.time_G + tokens / self.speed_G, np.inf).argmin())
        self.held_EG[expert, gpu] = True
        self.room_G[gpu] -= 1
        self.time_G[gpu] += tokens / self.speed_G[gpu]

    def fill(self) -> None:
        """Further replicas of the experts with most tokens for each, on the GPUs with least to do."""
        count_E = np.maximum(self.held_EG.sum(1), 1)
        for _ in range(int(self.room_G.sum())):
            gpu = int(np.where(self.room_G > 0, self.time_G, np.inf).argmin())
            fits_E = ~self.held_EG[:, gpu] & ~self.forbidden_EG[:, gpu]
            self.room_G[gpu] -= 1
            if not fits_E.any():
                self.room_G[gpu] = 0
                continue
            expert = int(np.where(fits_E, self.load_E / count_E, -1.0).argmax())
            old = self.load_E[expert] / count_E[expert]
            count_E[expert] += 1
            self.time_G[self.held_EG[expert]] -= (old - self.load_E[expert] / count_E[expert]) / self.speed_G[
                self.held_EG[expert]
            ]
            self.held_EG[expert, gpu] = True
            self.time_G[gpu] += self.load_E[expert] / count_E[expert] / self.speed_G[gpu]

    def even_out(self) -> None:
        """Replicas trade places within their domain: no set of failures is lost by that."""
        piece_E = self.load_E / np.maximum(self.held_EG.sum(1), 1)
        for domain in range(int(self.domain_G.max()) + 1):
            inside = np.flatnonzero(self.domain_G == domain)
            held = np.flatnonzero(self.held_EG[:, inside].any(1))
            if len(inside) < 2 or self.forbidden_EG[:, inside].any() or not len(held):
                continue
            part_EG = self.held_EG[np.ix_(held, inside)]
            slots_GC = _table(part_EG, int(part_EG.sum(0).max()))
            load_H = (piece_E[held] * part_EG.sum(1))[None]
            used_G = part_EG.sum(0)[None]
            slots_GC = improve(load_H, slots_GC[None], used_G, self.speed_G[inside])[0]
            self.held_EG[np.ix_(held, inside)] = held_LGE(slots_GC[None], len(held))[0].T

    def slots(self, wide: int) -> SlotArray:
        """The contents as a table, shape [G, C]."""
        return _table(self.held_EG, wide)


def _table(held_EG: BoolArray, wide: int) -> SlotArray:
    slots_GC = np.full((held_EG.shape[1], wide), -1, dtype=np.int32)
    for gpu in range(len(slots_GC)):
        held = np.flatnonzero(held_EG[:, gpu])
        slots_GC[gpu, : len(held)] = held
    return slots_GC
