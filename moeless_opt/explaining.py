"""Why a layer is not better: the GPUs that are tight, what proves the bound, and what would make it lower.

A placement is tight where a set of GPUs is the only home of its experts: no token shares can bring those GPUs
below the load of these experts. A bound is proven by a set of experts, too: with the loads of all others
taken away it still holds. What would help is found by doing it: each way is a changed plan (of a changed
problem, where a slot, a GPU or a limit has to change), evaluated and verified.

Axes: K candidates, L layers, E experts, G GPUs, C slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeless_opt.api import solve
from moeless_opt.conflicts import Contradiction, contradiction
from moeless_opt.problems.arrays import BoolArray, FloatArray, SlotArray
from moeless_opt.problems.errors import MoelessError, ProblemError
from moeless_opt.problems.plan import (
    PROVEN,
    Plan,
    gpu_times,
    gpu_tokens,
    perfect_times,
    replicas_needed,
    violations,
)
from moeless_opt.problems.spec import Limits, Loads, Placement, Problem, Risk, Split, span
from moeless_opt.problems.text import bytes_text, html_facts
from moeless_opt.report import paragraph
from moeless_opt.solvers.core import Clock, NeverStop, Stop, lower_bound
from moeless_opt.solvers.core.finish import Built, finish
from moeless_opt.solvers.shares import best_shares, solve_shares

__all__ = ["BoundProof", "Explanation", "Tight", "Way", "explain"]

_WIDE = 6  # experts and GPUs of each side that are tried for a way
_LESS = 1e-9  # relative; what a way must save at least


@dataclass(frozen=True, slots=True, kw_only=True)
class Tight:
    """GPUs that cannot hand on what they carry.

    Parameters
    ----------
    gpus : tuple of int
        The GPUs.
    experts : tuple of int
        Experts with load of which no other GPU has a replica; with an equal split, all that they hold.
    load : float
        Tokens of these experts; with an equal split, what they serve.
    closed : bool
        Whether no token shares on this placement are better: these experts alone make up the layer's time, or
        the split is equal.
    scenario : str
        The scenario that all this is said of, by its name or number: of several, the one that lifts the
        layer's time most; empty where there is one.
    """

    gpus: tuple[int, ...]
    experts: tuple[int, ...]
    load: float
    closed: bool
    scenario: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundProof:
    """What proves the layer's lower bound.

    Parameters
    ----------
    name : str
        As in the certificate.
    bound : float
        No placement on these GPUs has a smaller largest time.
    experts : tuple of int
        Experts whose loads alone have this bound, heaviest first; all of them where nothing less does.
    text : str
        The argument in words.
    """

    name: str
    bound: float
    experts: tuple[int, ...]
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """A change that lowers the layer's time, made and verified.

    Parameters
    ----------
    kind : str
        ``"shares"``, ``"move"``, ``"search"`` (another plan of the same problem), ``"limit"``, ``"slot"`` or
        ``"gpu"``.
    text : str
        What to do.
    moves : int
        Replicas that have to be shipped for it, from the plan that is explained.
    before, after : float
        The layer's largest GPU time.
    problem : Problem
        With the slot, GPU or limit changed.
    plan : Plan
        The whole plan, this change made.
    """

    kind: str
    text: str
    moves: int
    before: float
    after: float
    problem: Problem
    plan: Plan

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON, without the plan."""
        return {key: getattr(self, key) for key in ("kind", "text", "moves", "before", "after")}


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Explanation:
    """Why one layer of a plan is not better.

    Parameters
    ----------
    layer : int
        The model's own number.
    time : float
        The largest GPU time.
    unit : str
        Of the times.
    tight : Tight
        The GPUs that make it so.
    proof : BoundProof
        What no placement can go below.
    ways : tuple of Way
        What would lower it, the cheapest first; empty where nothing was found.
    split : Split or str
        How tokens are divided over an expert's replicas.
    """

    layer: int
    time: float
    unit: str
    tight: Tight
    proof: BoundProof
    ways: tuple[Way, ...]
    split: str = Split.FRACTIONAL

    @property
    def optimal(self) -> bool:
        """Whether the time is proven least for these GPUs, slots and limits."""
        return self.time <= self.proof.bound * (1 + PROVEN)

    @property
    def gap(self) -> float:
        """How far the time is above the bound, relative."""
        return self.time / self.proof.bound - 1 if self.proof.bound > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The explanation as JSON."""
        return {
            "format": "moeless-explanation",
            "version": 1,
            "layer": self.layer,
            "time": self.time,
            "unit": self.unit,
            "optimal": self.optimal,
            "tight": {
                "gpus": list(self.tight.gpus),
                "experts": list(self.tight.experts),
                "load": self.tight.load,
                "closed": self.tight.closed,
                "scenario": self.tight.scenario,
            },
            "proof": {
                "name": self.proof.name,
                "bound": self.proof.bound,
                "experts": list(self.proof.experts),
                "text": self.proof.text,
            },
            "ways": [way.to_dict() for way in self.ways],
        }

    def _facts(self) -> list[tuple[str, str]]:
        tight, proof = self.tight, self.proof
        above = "the least there can be" if self.optimal else f"{self.gap:.3%} above its bound"
        if proof.bound <= 0:
            above = "nothing to do"
        facts = [(f"layer {self.layer}", f"takes {self.time:.6g} {self.unit}: {above}")]
        has = "has" if len(tight.experts) == 1 else "have"
        held = f"{_named('expert', tight.experts)} ({tight.load:.6g} tokens) {has} no replica elsewhere"
        closed = "no token shares make them faster" if tight.closed else "other token shares may be faster"
        if self.split != "fractional":
            held = f"{tight.load:.6g} tokens of {_named('expert', tight.experts)}"
            closed = "split evenly" if self.split == "equal" else "each from where it is nearest"
        when = f"in scenario {tight.scenario} " if tight.scenario else ""
        facts.append(("tight", f"{when}{_named('GPU', tight.gpus)}: {held}; {closed}"))
        facts.append((f"bound {proof.bound:.6g} ({proof.name})", proof.text))
        for way in self.ways:
            saved = f"{way.after:.6g}, {1 - way.after / way.before:.3%} less"
            facts.append((f"by {way.kind}", f"{way.text}: {saved}"))
        if not self.ways:
            facts.append(("ways", "no single move, slot, GPU or limit was found that lowers it"))
        return facts

    def __str__(self) -> str:
        return "\n".join(paragraph(f"{name}: {text}") for name, text in self._facts())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_facts(self._facts(), f"Why layer {self.layer} is not better")


def explain(
    what: Plan | Problem,
    problem: Problem | None = None,
    *,
    layer: int | None = None,
    stop: Stop | None = None,
) -> Explanation | Contradiction:
    """Say why a layer of a plan is not better, or why a problem has no plan.

    Parameters
    ----------
    what : Plan or Problem
        A plan; or a problem that no plan satisfies.
    problem : Problem, optional
        What the plan is for; needed for one that was read from a file.
    layer : int, optional
        The model's own number; by default the layer with the largest gap, or else the largest imbalance.
    stop : Stop, optional
        When to be content with the ways found so far.

    Returns
    -------
    Explanation or Contradiction
        Both print as text and have `to_dict`.

    Raises
    ------
    ProblemError
        If the plan is not one of the problem, there is no such layer, or the problem has plans.

    Examples
    --------
    >>> import moeless_opt as mo
    >>> plan = mo.plan([[9, 1, 1, 1]], mo.uniform(1, 2, slots=2))
    >>> told = mo.explain(plan)
    >>> told.time, told.proof.bound, told.ways[0].kind
    (10.0, 10.0, 'slot')
    """
    stop = stop or NeverStop()
    if isinstance(what, Problem):
        found = contradiction(what, stop=stop)
        if found is None:
            raise ProblemError("problem", "contradicts itself nowhere: give a plan of it to explain")
        return found
    if not isinstance(what, Plan):
        raise ProblemError("what", f"is {type(what).__name__}, must be a Plan or a Problem")
    if problem is None:
        if isinstance(what.made_for, str):
            raise ProblemError("problem", "is missing: the plan does not hold the problem that it is for")
        problem = what.made_for
    if wrong := violations(problem, what):
        raise ProblemError("plan", f"is no plan of this problem: {wrong[0]}")
    if layer is None:
        gap_L = what.certificate.gap_L
        open_L = gap_L > PROVEN
        row = int(np.argmax(gap_L if open_L.any() else what.imbalance_L))
    elif layer in what.layers:
        row = what.layers.index(layer)
    else:
        raise ProblemError("layer", f"is {layer}, the plan is for the layers {span(what.layers)}")
    case = _Case.of(problem, what, row)
    idle = case.load_E.max() <= 0
    return Explanation(
        layer=what.layers[row],
        time=case.time,
        unit=what.unit,
        tight=_tight(case),
        proof=_proof(case),
        split=problem.split,
        ways=() if idle else tuple(_ways(case, stop)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """One layer of a plan."""

    problem: Problem
    plan: Plan
    row: int
    load_E: FloatArray
    slots_GC: SlotArray
    time: float

    @classmethod
    def of(cls, problem: Problem, plan: Plan, row: int) -> _Case:
        wide = max(int(problem.capacity_LG[row].max()), plan.slots_LGC.shape[2]) + 1
        slots_GC = np.full((plan.slots_LGC.shape[1], wide), -1, dtype=np.int32)
        slots_GC[:, : plan.slots_LGC.shape[2]] = plan.slots_LGC[row]
        return cls(
            problem=problem,
            plan=plan,
            row=row,
            load_E=problem.load_LE[row],
            slots_GC=slots_GC,
            time=float(plan.certificate.value_L[row]),
        )

    @property
    def holds_EG(self) -> BoolArray:
        """Which GPU has which expert, shape [E, G]."""
        held = np.zeros((self.problem.experts, len(self.slots_GC)), dtype=np.bool_)
        gpu, slot = np.nonzero(self.slots_GC >= 0)
        held[self.slots_GC[gpu, slot], gpu] = True
        return held

    def times(self, slots_KGC: SlotArray) -> FloatArray:
        """The layer's largest time by each of several placements, shape [K]."""
        count = len(slots_KGC)
        many = _layers_of(self.problem, np.repeat(self.row, count))
        room_G = many.topology.slots_G
        assert room_G is not None
        wider_G = np.where(room_G > 0, room_G + 1, 0)  # some of them take a slot that is yet to come
        many = many.replace(topology=many.topology.replace(slots_G=wider_G))
        share_KGC = best_shares(many, slots_KGC)
        built = Built(slots_LGC=slots_KGC, share_LGC=share_KGC)
        return finish(many, built, solver="", began=Clock.begin(), certify=False).certificate.value_L

    def made(self, problem: Problem, slots_GC: SlotArray) -> Plan:
        """The whole plan, with other slots in this layer."""
        old, layers = self.plan, len(self.plan.layers)
        wide = max(old.slots_LGC.shape[2], int((slots_GC >= 0).sum(1).max()))
        slots_LGC = np.full((layers, len(slots_GC), wide), -1, dtype=np.int32)
        share_LGC = np.zeros(slots_LGC.shape)
        gpus, slots = old.slots_LGC.shape[1:]
        slots_LGC[:, :gpus, :slots], share_LGC[:, :gpus, :slots] = old.slots_LGC, old.share_LGC
        packed = np.full(slots_LGC.shape[1:], -1, dtype=np.int32)
        for gpu, row_C in enumerate(slots_GC):
            kept = row_C[row_C >= 0]
            packed[gpu, : len(kept)] = kept
        slots_LGC[self.row] = packed
        alone = _layers_of(problem, np.array([self.row]))
        share_LGC[self.row] = best_shares(alone, packed[None])[0]
        built = Built(slots_LGC=slots_LGC, share_LGC=share_LGC)
        return finish(problem, built, solver=old.certificate.solver, began=Clock.begin())


def _layers_of(problem: Problem, rows: Any) -> Problem:
    """Some layers of a problem (or one of them several times), with nothing live and no limits."""
    loads = problem.loads
    by_node = None if loads.load_TLNE is None else loads.load_TLNE[:, rows]
    capacity_G = problem.capacity_LG[rows].max(0)
    kept = tuple(name for name in problem.objective.priorities if name not in ("groups", "hops", "survival"))
    return problem.replace(
        groups=None,
        objective=problem.objective.replace(priorities=kept or ("balance",)),
        loads=Loads(load_TLE=loads.load_TLE[:, rows], weight_T=loads.weight_T, load_TLNE=by_node),
        topology=problem.topology.replace(slots_G=capacity_G, memory_G=None),
        expert_bytes_L=problem.bytes_L[rows] if problem.bytes_L.any() else None,
        model=None,
        current=None,
        limits=Limits(),
        known=None,
    )


def _named(what: str, numbers: tuple[int, ...], most: int = 8) -> str:
    """``GPUs 3, 17 and 5 others``."""
    if len(numbers) == 1:
        return f"{what} {numbers[0]}"
    listed = ", ".join(map(str, numbers[:most]))
    return f"{what}s {listed}" + (f" and {len(numbers) - most} others" if len(numbers) > most else "")


# --- why it is as it is ------------------------------------------------------------------------------------


def _heaviest(case: _Case) -> tuple[str, FloatArray, FloatArray, FloatArray]:
    """Of the scenarios the one that lifts the time most: name, loads [E], GPU times [G], shares [G, C]."""
    loads, plan, row = case.problem.loads, case.plan, case.row
    count = loads.shape[0]
    if count == 1:
        return "", case.load_E, plan.time_LG[row], plan.share_LGC[row]
    share_TLGC = plan.scenario_share_TLGC
    share_TGC = [plan.share_LGC[row] if share_TLGC is None else share_TLGC[t, row] for t in range(count)]
    load_TE, speed_G = loads.load_TLE[:, row], case.problem.topology.speed_G
    slots_TGC = np.broadcast_to(plan.slots_LGC[row], (count, *plan.slots_LGC.shape[1:]))
    usable_TG = np.broadcast_to(case.problem.usable_LG[row], (count, len(speed_G)))
    time_TG = gpu_times(load_TE, slots_TGC, np.array(share_TGC), speed_G, case.problem.time)
    time_TG = np.where(usable_TG, time_TG, 0.0)
    rise_T = time_TG.max(1)
    if case.problem.objective.risk == Risk.EXPECTED:
        rise_T = rise_T - perfect_times(time_TG, speed_G, usable_TG)
        rise_T = rise_T if loads.weight_T is None else rise_T * loads.weight_T
    t = int(rise_T.argmax())
    return loads.scenarios[t] if loads.scenarios else str(t), load_TE[t], time_TG[t], share_TGC[t]


def _tight(case: _Case) -> Tight:
    """The GPUs that bind: with free shares those that cannot hand tokens on, else the busiest ones."""
    scenario, load_E, time_G, share_GC = _heaviest(case)
    busiest_G = time_G >= time_G.max() * (1 - _LESS)
    problem, closed, tight_G = case.problem, False, busiest_G
    if problem.split == "fractional" and problem.time.counts_tokens_only:
        shares = solve_shares(load_E[None], case.slots_GC[None], problem.topology.speed_G)
        least = float(shares.bound_L[0]) * problem.time.token_cost
        if float(time_G.max()) <= least * (1 + PROVEN):
            closed, tight_G = True, shares.critical_LG[0]
    held_EG = case.holds_EG
    inside_E = (load_E > 0) & ~(held_EG & ~tight_G).any(1)
    load = float(load_E[inside_E].sum())
    if problem.split != "fractional":  # an engine with a rule of its own has no shares to change
        closed, inside_E = True, (load_E > 0) & (held_EG & tight_G).any(1)
        slots_GC = case.slots_GC[:, : share_GC.shape[1]]  # a case may have room for more
        load = float(gpu_tokens(load_E[None], slots_GC[None], share_GC[None])[0, tight_G].sum())
    experts = np.flatnonzero(inside_E)
    experts = experts[np.argsort(-load_E[experts], kind="stable")]
    return Tight(
        gpus=tuple(np.flatnonzero(tight_G).tolist()),
        experts=tuple(experts.tolist()),
        load=load,
        closed=closed,
        scenario=scenario,
    )


def _proof(case: _Case) -> BoundProof:
    """The fewest of the heaviest experts that have the bound by themselves, and the argument in words."""
    certificate = case.plan.certificate
    bound, name = float(certificate.lower_bound_L[case.row]), certificate.bound_L[case.row]
    order_E = np.argsort(-case.load_E, kind="stable")
    busy = int((case.load_E > 0).sum())
    count = busy
    if busy > 1 and name != "mean":
        low, high = 0, busy  # the bound of so many is too low; is enough (or all there are)
        while high - low > 1:
            middle = (low + high) // 2
            if bound_of(case.problem, case.row, order_E[:middle].tolist()) >= bound * (1 - PROVEN):
                high = middle
            else:
                low = middle
        count = high
    experts = tuple(order_E[:count].tolist())
    return BoundProof(name=name, bound=bound, experts=experts, text=_argument(case, name, bound, experts))


def bound_of(problem: Problem, row: int, experts: list[int]) -> float:
    """The lower bound of a layer (by its row) of which only these experts have any load."""
    kept_E = np.zeros(problem.experts)
    kept_E[experts] = 1.0
    loads = problem.loads
    alone = problem.replace(
        loads=Loads(load_TLE=loads.load_TLE[:, [row]] * kept_E, weight_T=loads.weight_T),
        topology=problem.topology.replace(slots_G=problem.capacity_LG[row], memory_G=None),
        expert_bytes_L=None,
        model=None,
        current=None,
        limits=problem.limits.replace(pinned=(), forbidden=()),
        known=None,
    )
    return float(lower_bound(alone)[0][0])


def _argument(case: _Case, name: str, bound: float, experts: tuple[int, ...]) -> str:
    problem, row = case.problem, case.row
    room_G = problem.capacity_LG[row]
    gpus, slots = int((room_G > 0).sum()), int(np.minimum(room_G, problem.experts).sum())
    most = problem.limits.max_layer_replicas
    slots = slots if most is None else min(slots, most)
    spare = slots - problem.experts
    total = f"{case.load_E.sum():.6g} tokens"
    if name == "mean":
        return f"all {total} spread evenly over the {gpus} GPUs take that long; only more or faster GPUs help"
    if name == "tau":
        return _apportioned(case, bound, experts, slots)
    if name == "slots":
        few = tuple(np.flatnonzero((room_G > 0) & (room_G < room_G.max())).tolist())
        return (
            f"{_named('GPU', few)} cannot be given more than their few slots hold, even of the heaviest; "
            f"what is left of {total} takes the others that long"
        )
    if name == "packing":
        return (
            f"{spare} spare slots divide at most {spare} experts; of the {len(experts)} heaviest the others "
            f"are whole, more than there are GPUs ({gpus}): some lie together"
        )
    if name == "fillers":
        return (
            f"with {spare} spare slots nearly every GPU is full of whole experts: the heaviest lie with "
            "others, if only with the lightest"
        )
    if name == "limits":
        return (
            "pins and bans confine experts to some GPUs, or fill a GPU with what is pinned there: "
            "within them no placement ends sooner"
        )
    if name == "search":
        return "all placements within the limits that could end sooner were looked at"
    if name == "capacity":
        return "by the measured times, no choice of activated experts on the GPUs serves all tokens sooner"
    return f"proven by {case.plan.certificate.solver} ({name}); no short argument is known"


def _apportioned(case: _Case, bound: float, experts: tuple[int, ...], slots: int) -> str:
    """Why slots do not suffice to end sooner: how many replicas that would take."""
    problem = case.problem
    alive_G = problem.capacity_LG[case.row] > 0
    sooner = np.array([bound * (1 - 1e-6)])
    speed_G, split, time = problem.topology.speed_G[alive_G], problem.split, problem.time
    need_E = replicas_needed(case.load_E[None], sooner, speed_G, split, time=time)[0]
    wants = [f"{int(need_E[e])} of expert {e}" for e in experts[:6]]
    more = f" and {len(experts) - 6} more" if len(experts) > 6 else ""
    if int(need_E.max()) > len(speed_G):
        heavy = experts[0]
        return f"expert {heavy} ({case.load_E[heavy]:.6g} tokens) takes that long with a replica on every GPU"
    if problem.limits.max_replicas is not None and int(need_E.max()) > problem.limits.max_replicas:
        heavy = experts[0]
        return (
            f"expert {heavy} ({case.load_E[heavy]:.6g} tokens) takes that long with the "
            f"{problem.limits.max_replicas} replicas that limits.max_replicas allows"
        )
    return (
        f"to end sooner takes {int(need_E.sum())} replicas ({', '.join(wants)}{more}; one of each other), "
        f"there is room for {slots}"
    )


# --- what would help ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Change:
    """Another placement of the layer."""

    kind: str
    moves: int
    slots_GC: SlotArray
    text: str
    gpu: int = -1


def _ways(case: _Case, stop: Stop) -> Iterator[Way]:
    """What lowers the layer's time: first what costs nothing, then moves, limits, slots, GPUs."""
    optimal = case.time <= float(case.plan.certificate.lower_bound_L[case.row]) * (1 + PROVEN)
    if not optimal and case.problem.split == "fractional":
        yield from _way(case, case.problem, _Change("shares", 0, case.slots_GC, "other token shares"))
    changes = _changes(case)
    if changes and not stop():
        after_K = case.times(np.stack([change.slots_GC for change in changes]))
        order = [int(k) for k in np.argsort(after_K, kind="stable") if after_K[k] < case.time * (1 - _LESS)]
        better = [changes[k] for k in order]
        moving = [change for change in better if change.kind == "move"]
        if not optimal:
            for moves in (1, 2):
                yield from _first(case, [one for one in moving if one.moves == moves], _way_as_it_is)
        yield from _first(case, moving, _way_by_limit)
        slots = [change for change in better if change.kind == "slot"]
        yield from _first(case, slots, _way_by_slot)
        if slots:
            return
    found = case.time
    if not optimal and not stop():
        for way in _way_by_search(case, stop):
            found = way.after
            yield way
    if not stop():
        yield from _way_by_replicas(case, stop, found)
    if not stop():
        yield from _way_by_slots(case, stop, found)
    if optimal and not stop():
        yield from _way_by_gpu(case, stop)


def _first(
    case: _Case, changes: list[_Change], make: Callable[[_Case, _Change], Iterator[Way]]
) -> Iterator[Way]:
    """The first change that can be made that way, of the best few."""
    for change in changes[:_WIDE]:
        for way in make(case, change):
            yield way
            return


def _way(case: _Case, problem: Problem, change: _Change, *, below: float = float("inf")) -> Iterator[Way]:
    """The change made and verified; nothing if it breaks a rule or ends no sooner than that, and than now."""
    try:
        plan = case.made(problem, change.slots_GC)
    except MoelessError:  # no such plan can be
        return
    after = float(plan.certificate.value_L[case.row])
    if after < min(case.time, below) * (1 - _LESS) and not violations(problem, plan):
        yield Way(
            kind=change.kind,
            text=change.text,
            moves=_shipped(case, plan),
            before=case.time,
            after=after,
            problem=problem,
            plan=plan,
        )


def _shipped(case: _Case, plan: Plan) -> int:
    """Replicas of this layer on GPUs that do not have them in the plan that is explained."""
    had_EG = case.holds_EG
    slots_GC = plan.slots_LGC[case.row]
    gpu, slot = np.nonzero(slots_GC >= 0)
    old = gpu < had_EG.shape[1]
    kept = had_EG[slots_GC[gpu[old], slot[old]], gpu[old]].sum()
    return int(len(gpu) - kept)


def _way_as_it_is(case: _Case, change: _Change) -> Iterator[Way]:
    yield from _way(case, case.problem, change)


def _way_by_slot(case: _Case, change: _Change) -> Iterator[Way]:
    add_G = np.zeros(case.problem.topology.gpus, dtype=np.int64)
    add_G[change.gpu] = 1
    yield from _way(case, _with_slots(case, add_G), change)


def _way_by_limit(case: _Case, change: _Change) -> Iterator[Way]:
    """The change with the one limit lifted that bars it."""
    problem = case.problem
    try:
        plan = case.made(problem, change.slots_GC)
    except MoelessError:
        return
    if not violations(problem, plan):
        return  # no limit bars it
    for name, value, told in _lifted(problem, plan):
        lifted = problem.replace(limits=problem.limits.replace(**{name: value}))
        text = f"limits.{name} {told}: {change.text}"
        yield from _way(case, lifted, _Change("limit", change.moves, change.slots_GC, text))


def _lifted(problem: Problem, plan: Plan) -> Iterator[tuple[str, Any, str]]:
    """Limits that a plan exceeds, what would be enough for it, and that in words."""
    limits, count_LE, size_L = problem.limits, plan.replicas_LE, problem.bytes_L
    by_layer = count_LE.sum(1)
    needs = {
        "max_replicas": int(count_LE.max()),
        "max_layer_replicas": int(by_layer.max()),
        "max_total_replicas": int(by_layer.sum()),
        "max_total_bytes": int(by_layer @ size_L),
        "max_moves": plan.moves.count,
        "max_move_bytes": plan.moves.bytes,
        "max_layer_moves": int(plan.moves.count_L.max()),
    }
    for name, need in needs.items():
        limit = getattr(limits, name)
        if limit is not None and need > limit:
            shown = [bytes_text(n) if "bytes" in name else str(n) for n in (need, limit)]
            yield name, need, f"of {shown[0]} instead of {shown[1]}"
    least = int(count_LE.min())
    if least < limits.min_replicas:
        yield "min_replicas", least, f"of {least} instead of {limits.min_replicas}"
    if limits.spread > 1:
        yield "spread", 1, f"of 1 instead of {limits.spread}"
    rows = {layer: x for x, layer in enumerate(plan.layers)}
    for key in ("pinned", "forbidden"):
        pairs = getattr(limits, key)
        broken = []
        for layer, expert, gpu in pairs:
            some = plan.slots_LGC if layer < 0 else plan.slots_LGC[[rows[layer]]]
            there = (some[:, gpu] == expert).any(1)
            if (key == "pinned" and not there.all()) or (key == "forbidden" and there.any()):
                broken.append((layer, expert, gpu))
        if broken:
            _, expert, gpu = broken[0]
            yield key, tuple(p for p in pairs if p not in broken), f"without expert {expert} on GPU {gpu}"


def _changes(case: _Case) -> list[_Change]:
    """Single replicas that relieve the tight GPUs: on free or new slots, in place of others, exchanged."""
    tight, held_EG = _tight(case), case.holds_EG
    outside_G = np.ones(len(case.slots_GC), dtype=np.bool_)
    outside_G[list(tight.gpus)] = False
    outside_G &= case.problem.capacity_LG[case.row] > 0
    time_G = case.plan.time_LG[case.row]
    targets = [int(g) for g in np.argsort(time_G, kind="stable") if outside_G[g]][:_WIDE]
    piece_E = case.load_E / np.maximum(held_EG.sum(1), 1)
    candidates = [int(e) for e in np.argsort(-piece_E, kind="stable") if held_EG[e, list(tight.gpus)].any()]
    if case.problem.split == "fractional":  # what has a home outside is relieved by shares already
        candidates = [e for e in candidates if e in set(tight.experts)] or candidates
    changes: list[_Change] = []
    for expert in candidates[:_WIDE]:
        for gpu in targets:
            if not held_EG[expert, gpu]:
                changes += _to_gpu(case, expert, gpu, tight, held_EG, piece_E)
    return changes


def _to_gpu(
    case: _Case, expert: int, gpu: int, tight: Tight, held_EG: BoolArray, piece_E: FloatArray
) -> Iterator[_Change]:
    """Ways of bringing a replica of an expert to a GPU."""
    slots_GC, room = case.slots_GC, int(case.problem.capacity_LG[case.row, gpu])
    there = np.flatnonzero(held_EG[:, gpu])
    homes = [g for g in tight.gpus if held_EG[expert, g]]
    one = f"a replica of expert {expert}"
    end = len(there)

    def changed(*puts: tuple[int, int, int]) -> SlotArray:
        made = slots_GC.copy()
        for at, old, new in puts:
            made[at, int(np.flatnonzero(made[at] == old)[0])] = new
        return made

    if end < room:
        yield _Change("move", 1, changed((gpu, -1, expert)), f"{one} on GPU {gpu}, in a free slot")
        for home in homes[:1]:
            text = f"expert {expert} from GPU {home} to a free slot of GPU {gpu}"
            yield _Change("move", 1, changed((gpu, -1, expert), (home, expert, -1)), text)
    else:
        text = f"one more slot on GPU {gpu}, for {one}"
        yield _Change("slot", 1, changed((gpu, -1, expert)), text, gpu)
    light = [int(e) for e in there[np.argsort(piece_E[there], kind="stable")]]
    many_E = held_EG.sum(1)
    for other in [e for e in light if many_E[e] > 1][:3]:
        text = f"{one} on GPU {gpu}, in place of expert {other}, which has others"
        yield _Change("move", 1, changed((gpu, other, expert)), text)
    for home in homes[:2]:
        for other in [e for e in light if not held_EG[e, home]][:3]:
            text = f"expert {expert} of GPU {home} and expert {other} of GPU {gpu} exchanged"
            yield _Change("move", 2, changed((gpu, other, expert), (home, expert, other)), text)


def _with_slots(case: _Case, add_G: Any, problem: Problem | None = None) -> Problem:
    """The problem with more slots on some GPUs (in every layer), and the memory for them."""
    problem = problem or case.problem
    topology, size_L = problem.topology, problem.bytes_L
    changes: dict[str, Any] = {}
    if topology.slots_G is not None:
        changes["slots_G"] = topology.slots_G + add_G
    if topology.memory_G is not None and size_L.any():
        shared = problem.sizing.policy == "memory"
        changes["memory_G"] = topology.memory_G + add_G * int(size_L[case.row] if shared else size_L.sum())
    return problem.replace(topology=topology.replace(**changes), known=None)


def _alone(case: _Case, problem: Problem, stop: Stop, limits: Limits | None = None) -> SlotArray | None:
    """The layer solved by itself, with nothing live and no other limits, shape [G, C]."""
    alone = _layers_of(problem, np.array([case.row]))
    found = solve(alone if limits is None else alone.replace(limits=limits), stop=stop).plan
    return None if found is None else found.slots_LGC[0]


def _way_by_search(case: _Case, stop: Stop) -> Iterator[Way]:
    slots_GC = _alone(case, case.problem, stop)
    if slots_GC is not None:
        text = "another placement of this layer, found without looking at what is live"
        yield from _way(case, case.problem, _Change("search", 0, slots_GC, text))


def _way_by_replicas(case: _Case, stop: Stop, below: float) -> Iterator[Way]:
    """One more replica than a limit on them allows, and a search."""
    problem = case.problem
    for name in ("max_replicas", "max_layer_replicas"):
        limit = getattr(problem.limits, name)
        if limit is None or stop():
            continue
        change = {name: limit + 1}
        more = problem.replace(limits=problem.limits.replace(**change), known=None)
        kept = Limits(
            max_replicas=more.limits.max_replicas, max_layer_replicas=more.limits.max_layer_replicas
        )
        slots_GC = _alone(case, more, stop, kept)
        if slots_GC is not None:
            text = f"limits.{name} of {limit + 1} instead of {limit}, and a search"
            for way in _way(case, more, _Change("limit", 0, slots_GC, text), below=below):
                if violations(problem, way.plan):  # else it is no matter of the limit
                    yield way


def _way_by_slots(case: _Case, stop: Stop, below: float) -> Iterator[Way]:
    """The fewest GPUs with one more slot each that let a search end sooner, by doubling and halving."""
    alive = np.flatnonzero(case.problem.capacity_LG[case.row] > 0)
    if (case.problem.capacity_LG[case.row, alive] >= case.problem.experts).all():
        return
    best: Way | None = None

    def tried(count: int) -> Way | None:
        add_G = np.zeros(case.problem.topology.gpus, dtype=np.int64)
        add_G[alive[:count]] = 1
        more = _with_slots(case, add_G)
        slots_GC = _alone(case, more, stop)
        if slots_GC is None:
            return None
        named = _named("GPU", tuple(alive[:count].tolist()))
        text = f"one more slot on {'each of ' if count > 1 else ''}{named}, and a search"
        return next(_way(case, more, _Change("slot", 0, slots_GC, text), below=below), None)

    low, high = 0, 1
    while best is None and low < len(alive) and not stop():
        high = min(high, len(alive))
        best = tried(high)
        if best is None:
            low, high = high, 2 * high
    while best is not None and high - low > 1 and not stop():
        middle = (low + high) // 2
        found = tried(middle)
        if found is None:
            low = middle
        else:
            best, high = found, middle
    if best is not None:
        yield best


def _way_by_gpu(case: _Case, stop: Stop) -> Iterator[Way]:
    """One more GPU like the last one that has room."""
    problem = case.problem
    topology, like = problem.topology, int(np.flatnonzero(problem.capacity_LG[case.row] > 0)[-1])
    changes: dict[str, Any] = {}
    for key in ("node_G", "speed_G", "slots_G", "memory_G", "domain_G"):
        array = getattr(topology, key)
        if array is not None:
            changes[key] = np.append(array, array[like])
    current = problem.current
    if current is not None:
        empty = np.full((problem.layers, 1, current.slots_LGC.shape[2]), -1, dtype=np.int32)
        slots_LGC = np.concatenate([current.slots_LGC, empty], axis=1)
        current = Placement(slots_LGC=slots_LGC, experts=problem.experts, partial=current.partial)
    if topology.cost_GG is not None:
        near = topology.cost_GG[like]
        cost_GG = np.pad(topology.cost_GG, (0, 1))
        cost_GG[-1, :-1], cost_GG[:-1, -1] = near, topology.cost_GG[:, like]
        cost_GG[-1, like] = cost_GG[like, -1] = near[near > 0].min(initial=near.max(initial=0.0))
        changes["cost_GG"] = cost_GG
    loads = problem.loads
    if loads.load_TLGE is not None:  # no tokens come from it
        loads = loads.replace(load_TLGE=np.pad(loads.load_TLGE, ((0, 0), (0, 0), (0, 1), (0, 0))))
    wider = problem.replace(topology=topology.replace(**changes), loads=loads, current=current, known=None)
    slots_GC = _alone(case, wider, stop)
    if slots_GC is not None:
        yield from _way(
            case, wider, _Change("gpu", 0, slots_GC, f"one more GPU like GPU {like}, and a search")
        )
