"""The verifier: recomputes everything about a plan from the problem alone.

It shares no code with the solvers nor with ``evaluate``: where those gather along slots, this makes one list
of the (layer, GPU, expert) triples that hold a replica and sums over that. A plan that it accepts is valid
whatever found it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray, SlotArray
from moeless_opt.problems.errors import InvalidPlanError
from moeless_opt.problems.plan.plan import PROVEN, Plan
from moeless_opt.problems.plan.verify_locality import locality_violations
from moeless_opt.problems.plan.verify_survival import survival_violations
from moeless_opt.problems.spec import Problem, TimeModel

__all__ = ["check_slots", "verify", "violations"]

TOLERANCE = 1e-6
_WHOLE = 1e-9  # how far from whole entries may be
_MOST = 5  # examples listed of each kind


def verify(problem: Problem, plan: Plan) -> None:
    """Raise if `plan` is not a valid plan of `problem`, or claims what is not so.

    Raises
    ------
    InvalidPlanError
        With the list of all violations.
    """
    found = violations(problem, plan)
    if found:
        raise InvalidPlanError(found)


def violations(problem: Problem, plan: Plan) -> list[str]:
    """Every rule that the plan breaks, as text with the place; empty for a valid plan.

    Checked: shapes and expert ids, no expert twice on a GPU unless the problem's `fill` lets copies be,
    coverage, slots and that all are full where they must be, memory, token shares
    (that an equal split is equal, and entries of a table whole), replica limits, pinned and forbidden pairs,
    failure domains, groups kept on a node, moves and their limits, and the plan's own claims: times,
    imbalance, moves, bounds, locality, survival.
    """
    slots, share = plan.slots_LGC, plan.share_LGC
    layers, experts, gpus = problem.layers, problem.experts, problem.topology.gpus
    if slots.ndim != 3 or slots.shape[:2] != (layers, gpus):
        return [f"slots have shape {slots.shape}, the problem has {layers} layers and {gpus} GPUs"]
    if share.shape != slots.shape:
        return [f"shares have shape {share.shape}, the slots {slots.shape}"]
    each = plan.scenario_share_TLGC
    scenarios = problem.loads.shape[0]
    if each is not None and (each.shape != (scenarios, *slots.shape) or not _by_scenario(problem)):
        return [
            f"shares of scenarios have shape {each.shape}; slots of shape {slots.shape} with {scenarios} "
            f"scenarios and a {problem.split} split have none such"
        ]
    if slots.size == 0 or int(slots.min()) < -1 or int(slots.max()) >= experts:
        return [f"slots hold an expert outside -1..{experts - 1}"]
    held = _Held.of(experts, slots, share)
    found = _rules(problem, plan, held)
    if found and found[-1] == _NOT_SHARES:
        return found
    found += _memory(problem, held)
    if plan.split != problem.split:
        found.append(f"plan has a {plan.split} split, the problem asks for {problem.split}")
    if problem.share_entries is not None or plan.share_entries is not None:
        found += _entries(problem, plan)
    if problem.limits is not _NO_LIMITS:
        found += _limits(problem, held)
    found += _moves(problem, plan, held)
    found += [*locality_violations(problem, plan), *survival_violations(problem, plan)]
    return found + _claims(problem, plan, held)


@dataclass(slots=True)
class _Held:
    """Every expert that a GPU holds, one entry each, ordered by layer, GPU and expert.

    Parameters
    ----------
    layer_P, gpu_P, expert_P : arrays of int, shape [P]
        Where (the layer as a row of the problem), and which expert.
    slots_P : array of int, shape [P]
        Slots of the GPU that hold it; 1 in a valid plan, unless second copies may be.
    share_P : array, shape [P]
        Share of its tokens that the GPU serves.
    key_P : array of int, shape [P]
        Layer, GPU and expert as one number, ascending.
    replicas_LE, used_LG : arrays of int
        Filled slots, by expert and by GPU.
    """

    layer_P: IntArray
    gpu_P: IntArray
    expert_P: IntArray
    slots_P: IntArray
    share_P: FloatArray
    key_P: IntArray
    replicas_LE: IntArray
    used_LG: IntArray

    @classmethod
    def of(cls, experts: int, slots_LGC: SlotArray, share_LGC: FloatArray) -> _Held:
        """All layers of slots whose shapes and experts are in order, with some shares."""
        layers, gpus, slots = slots_LGC.shape
        order = np.argsort(slots_LGC, axis=2)
        expert = np.take_along_axis(slots_LGC, order, axis=2).astype(np.int64).ravel()
        share = np.take_along_axis(share_LGC, order, axis=2).ravel()
        filled = np.flatnonzero(expert >= 0)
        row, expert, share = filled // slots, expert[filled], share[filled]
        count = np.ones(len(row), dtype=np.int64)
        again = (row[1:] == row[:-1]) & (expert[1:] == expert[:-1])
        if again.any():
            first = np.flatnonzero(np.concatenate([[True], ~again]))
            count = np.diff(np.append(first, len(row)))
            row, expert, share = row[first], expert[first], np.add.reduceat(share, first)
        layer, gpu = np.divmod(row, gpus)
        return cls(
            layer,
            gpu,
            expert,
            count,
            share,
            row * experts + expert,
            _summed(layer * experts + expert, count, (layers, experts)).astype(np.int64),
            _summed(row, count, (layers, gpus)).astype(np.int64),
        )

    def at(self, layer: int, gpu: int, expert: int) -> bool:
        """Whether a GPU holds an expert."""
        key = (layer * self.used_LG.shape[1] + gpu) * self.replicas_LE.shape[1] + expert
        place = int(np.searchsorted(self.key_P, key))
        return place < len(self.key_P) and bool(self.key_P[place] == key)

    def by_expert(self, value_P: FloatArray | IntArray | BoolArray) -> FloatArray:
        """Sums over the GPUs, shape [L, E]."""
        shape = self.replicas_LE.shape
        return _summed(self.layer_P * shape[1] + self.expert_P, value_P, shape)

    def by_gpu(self, value_P: FloatArray | IntArray | BoolArray) -> FloatArray:
        """Sums over the experts, shape [L, G]."""
        shape = self.used_LG.shape
        return _summed(self.layer_P * shape[1] + self.gpu_P, value_P, shape)


def _summed(key: IntArray, value: FloatArray | IntArray | BoolArray, shape: tuple[int, ...]) -> FloatArray:
    """Sums of the values of each key, in a table of this shape."""
    total = np.bincount(key, weights=value, minlength=shape[0] * shape[1])
    return np.asarray(total, dtype=np.float64).reshape(shape)


def _rules(problem: Problem, plan: Plan, held: _Held) -> list[str]:
    """What holds for every plan: no expert twice on a GPU, all there, slots, and shares."""
    layers, found = problem.loads.layers, []
    for p in np.flatnonzero(held.slots_P > 1)[:_MOST] if problem.fill != "copies" else ():
        place = f"layer {layers[held.layer_P[p]]} GPU {held.gpu_P[p]}"
        found.append(f"{place}: expert {held.expert_P[p]} sits there {held.slots_P[p]} times")
    found += [
        f"layer {layers[x]}: expert {e} has {held.replicas_LE[x, e]} replicas, "
        f"needs {problem.limits.min_replicas}"
        for x, e in np.argwhere(held.replicas_LE < problem.limits.min_replicas)[:_MOST]
    ]
    capacity_LG, used_LG = problem.capacity_LG, held.used_LG
    found += [
        f"layer {layers[x]} GPU {g}: {used_LG[x, g]} replicas, room for {capacity_LG[x, g]}"
        for x, g in np.argwhere(used_LG > capacity_LG)[:_MOST]
    ]
    if problem.fill != "none":
        found += [
            f"layer {layers[x]} GPU {g}: {used_LG[x, g]} of {capacity_LG[x, g]} slots are full, "
            f"fill {problem.fill!r} wants all"
            for x, g in np.argwhere(used_LG < capacity_LG)[:_MOST]
        ]
    each = plan.scenario_share_TLGC
    for share_LGC in (plan.share_LGC, *(() if each is None else each)):
        if not (float(share_LGC.min()) >= -TOLERANCE and float(share_LGC.max()) < np.inf):
            return [*found, _NOT_SHARES]
    found += _sums(problem, plan.slots_LGC, plan.share_LGC, held, "")
    if problem.split == "equal":
        found += _uneven(problem, held)
    elif problem.split == "nearest":
        found += _astray(problem, plan, held)
    return found


def _sums(
    problem: Problem, slots_LGC: SlotArray, share_LGC: FloatArray, held: _Held, where: str
) -> list[str]:
    """Where an empty slot has a share, or those of an expert do not sum to 1."""
    found = [f"{where}an empty slot has a token share"] if ((slots_LGC < 0) & (share_LGC != 0)).any() else []
    total_LE = held.by_expert(held.share_P)
    return found + [
        f"{where}layer {problem.loads.layers[x]}: the shares of expert {e} sum to {total_LE[x, e]:.9g}, not 1"
        for x, e in np.argwhere(np.abs(total_LE - 1.0) > TOLERANCE)[:_MOST]
    ]


def _served(problem: Problem, plan: Plan, held: _Held) -> tuple[FloatArray, IntArray, list[str]]:
    """Tokens of every GPU and its replicas that serve any, in each scenario [T, L, G]; and odd shares."""
    each = plan.scenario_share_TLGC
    tokens, active, found = [], [], []
    for t, load_LE in enumerate(problem.loads.load_TLE):
        own = held
        if each is not None:
            own = _Held.of(problem.experts, plan.slots_LGC, each[t])
            found += _sums(problem, plan.slots_LGC, each[t], own, f"scenario {t}, ")
        served_P = own.share_P * load_LE[own.layer_P, own.expert_P]
        tokens.append(own.by_gpu(served_P))
        active.append(own.by_gpu(served_P > 0).astype(np.int64))
    return np.array(tokens), np.array(active), found


def _uneven(problem: Problem, held: _Held) -> list[str]:
    """Where an equal split is not equal: an expert's tokens are divided evenly over its slots.

    Without `fill`, slots that hold copies of what the GPU has may have been freed (`_even_over_slots`).
    """
    even_P = held.slots_P / held.replicas_LE[held.layer_P, held.expert_P]
    off_P = np.abs(held.share_P - even_P)
    uneven_LE = held.by_expert(off_P > TOLERANCE) > 0
    freed = problem.fill == "none" and _even_over_slots(problem, held, uneven_LE)
    if not uneven_LE.any() or freed:
        return []
    worst = int(off_P.argmax())
    place = f"layer {problem.loads.layers[held.layer_P[worst]]} GPU {held.gpu_P[worst]}"
    return [
        f"{place}: expert {held.expert_P[worst]} has share {held.share_P[worst]:.6g}, "
        f"an equal split gives {even_P[worst]:.6g}"
    ]


def _by_scenario(problem: Problem) -> bool:
    """Whether shares may differ from scenario to scenario."""
    if problem.split == "nearest":
        return problem.loads.shape[0] > 1 and problem.loads.load_TLNE is not None
    return problem.split == "fractional" and problem.objective.risk != "covariance"


def _astray(problem: Problem, plan: Plan, held: _Held) -> list[str]:
    """Where tokens do not go to the nearest replica, in the expected loads or in a scenario."""
    loads, each = problem.loads, plan.scenario_share_TLGC
    if _by_scenario(problem) and each is None:
        return ["the tokens come from other nodes in every scenario: shares of each scenario are missing"]
    cases = [("", plan.share_LGC, loads.load_LE, loads.load_LNE)]
    if each is not None and loads.load_TLNE is not None:
        cases += [
            (f"scenario {t}, ", each[t], loads.load_TLE[t], loads.load_TLNE[t]) for t in range(len(each))
        ]
    found = []
    for where, share_LGC, load_LE, load_LNE in cases:
        own = _Held.of(problem.experts, plan.slots_LGC, share_LGC)
        right_P = np.zeros(len(own.key_P))
        for x in range(problem.layers):
            here = own.layer_P == x
            pairs = own.expert_P[here], own.gpu_P[here]
            by_node_NE = None if load_LNE is None else load_LNE[x]
            right_P[here] = _nearest(problem, x, pairs, load_LE[x], by_node_NE)[pairs]
        off_P = np.abs(own.share_P - right_P)
        if off_P.size and not off_P.max() <= TOLERANCE:
            worst = int(off_P.argmax())
            place = f"layer {loads.layers[own.layer_P[worst]]} GPU {own.gpu_P[worst]}"
            found.append(
                f"{where}{place}: expert {own.expert_P[worst]} has share {own.share_P[worst]:.6g}, "
                f"tokens that go to the nearest replica give {right_P[worst]:.6g}"
            )
    return found


def _nearest(
    problem: Problem,
    x: int,
    pairs: tuple[IntArray, IntArray],
    load_E: FloatArray,
    load_NE: FloatArray | None,
) -> FloatArray:
    """Share that each GPU serves of every expert, summed source GPU by source GPU, shape [E, G]."""
    node_G, alive_G = problem.topology.node_G, problem.capacity_LG[x] > 0
    experts, gpus = problem.experts, len(node_G)
    held_EG = np.zeros((experts, gpus), dtype=np.bool_)
    held_EG[pairs] = True
    everywhere_EG = held_EG / np.maximum(held_EG.sum(1), 1)[:, None]
    share_EG = np.zeros((experts, gpus))
    for node in range(problem.topology.nodes):
        inside_G = node_G == node
        sources = int((inside_G & alive_G).sum())
        part_E = np.full(experts, sources / max(int(alive_G.sum()), 1))
        if load_NE is not None:
            part_E = np.divide(load_NE[node], load_E, out=part_E, where=load_E > 0)
        near_EG = held_EG & inside_G
        count_E = near_EG.sum(1)
        there_E = count_E > 0
        far_EG = np.where(there_E[:, None], near_EG / np.maximum(count_E, 1)[:, None], everywhere_EG)
        if not sources:  # no GPU is alive there to hold one
            share_EG += part_E[:, None] * everywhere_EG
            continue
        each_E = part_E / sources  # what one source GPU sends
        share_EG += each_E[:, None] * near_EG
        share_EG += (each_E * (sources - count_E))[:, None] * far_EG
    return share_EG


def _even_over_slots(problem: Problem, held: _Held, uneven_LE: BoolArray) -> bool:
    """Whether uneven shares are an even split over slots, several of which are one copy on one GPU.

    EPLB may fill two slots of a GPU with one expert. Its tokens are divided over the slots, so that GPU gets
    2/r of them, from the single copy that it needs. Such shares are multiples of 1/r, and the slots suffice.
    """
    slots_P: IntArray = (held.share_P > 0).astype(np.int64)
    for x, e in np.argwhere(uneven_LE):
        pairs = np.flatnonzero((held.layer_P == x) & (held.expert_P == e) & (held.share_P != 0))
        if len(pairs) < held.replicas_LE[x, e]:
            return False
        shares = held.share_P[pairs]
        counts = np.arange(held.replicas_LE[x, e], problem.capacity_LG[x].sum() + 1)
        whole = np.abs(shares * counts[:, None] - np.rint(shares * counts[:, None])).max(1) < 1e-9
        if not whole.any():
            return False
        slots_P[pairs] = np.rint(shares * counts[int(whole.argmax())])
    return bool((held.by_gpu(slots_P) <= problem.capacity_LG).all())


def _entries(problem: Problem, plan: Plan) -> list[str]:
    """Where shares are no whole entries of the dispatch table."""
    entries = problem.share_entries
    if entries is None or plan.share_entries != entries:
        return [f"plan has shares of {plan.share_entries} entries, the problem asks for {entries}"]
    each = plan.scenario_share_TLGC
    for name, share_LGC in (
        ("", plan.share_LGC),
        *((f"scenario {t}, ", s) for t, s in enumerate(() if each is None else each)),
    ):
        count_LGC = share_LGC * entries
        off = np.argwhere(~(np.abs(count_LGC - np.rint(count_LGC)) <= _WHOLE))
        if len(off):
            x, g, c = off[0]
            return [
                f"{name}layer {problem.loads.layers[x]} GPU {g}: expert {plan.slots_LGC[x, g, c]} has share "
                f"{share_LGC[x, g, c]:.9g}, no multiple of 1/{entries}"
            ]
    return []


def _memory(problem: Problem, held: _Held) -> list[str]:
    memory = problem.topology.memory_G
    if memory is None:
        return []
    need = problem.bytes_L @ held.used_LG
    return [
        f"GPU {g}: {int(need[g])} bytes of experts, room for {int(memory[g])}"
        for g in np.flatnonzero(need > memory)
    ]


def _limits(problem: Problem, held: _Held) -> list[str]:
    limits, replicas = problem.limits, held.replicas_LE
    found = []
    if limits.max_replicas is not None and replicas.max() > limits.max_replicas:
        found.append(f"an expert has {replicas.max()} replicas, at most {limits.max_replicas} are allowed")
    if limits.max_layer_replicas is not None and replicas.sum(1).max() > limits.max_layer_replicas:
        found.append(
            f"a layer has {replicas.sum(1).max()} replicas, at most {limits.max_layer_replicas} are allowed"
        )
    if limits.max_total_replicas is not None and replicas.sum() > limits.max_total_replicas:
        found.append(f"{replicas.sum()} replicas in all, at most {limits.max_total_replicas} are allowed")
    if limits.max_total_bytes is not None and replicas.sum(1) @ problem.bytes_L > limits.max_total_bytes:
        found.append(
            f"{replicas.sum(1) @ problem.bytes_L} bytes in all, at most {limits.max_total_bytes} are allowed"
        )
    if limits.spread > 1:
        domain = np.unique(problem.topology.failure_domain_G, return_inverse=True)[1].reshape(-1)
        row_P = held.layer_P * problem.experts + held.expert_P
        domains = int(domain.max()) + 1
        reached = np.unique(row_P * domains + domain[held.gpu_P]) // domains
        reach = np.bincount(reached, minlength=replicas.size).reshape(replicas.shape)
        found += [
            f"layer {problem.loads.layers[x]}: expert {e} is in {reach[x, e]} failure domains, "
            f"must be in {limits.spread}"
            for x, e in np.argwhere(_to_spread(problem) & (reach < limits.spread))[:_MOST]
        ]
    for layer, expert, gpu in limits.pinned:
        for x, number in enumerate(problem.loads.layers):
            if layer in (-1, number) and not held.at(x, gpu, expert):
                found.append(f"layer {number}: expert {expert} is pinned to GPU {gpu} and is not there")
    for layer, expert, gpu in limits.forbidden:
        for x, number in enumerate(problem.loads.layers):
            if layer in (-1, number) and held.at(x, gpu, expert):
                found.append(f"layer {number}: expert {expert} is forbidden on GPU {gpu} and is there")
    return found


def _to_spread(problem: Problem) -> BoolArray:
    """Experts that `Limits.spread` is for, shape [L, E]."""
    which = problem.limits.spread_experts
    if which is None:
        return np.ones((problem.layers, problem.experts), dtype=np.bool_)
    if isinstance(which, int):  # before which fewer others come
        number_E = np.arange(problem.experts)
        ahead = [
            (load_E[None, :] > load_E[:, None])
            | ((load_E[None, :] == load_E[:, None]) & (number_E[None, :] < number_E[:, None]))
            for load_E in problem.loads.load_LE
        ]
        return np.array([other_EE.sum(1) < which for other_EE in ahead])
    listed = set(which)
    return np.array(
        [
            [(layer, e) in listed or (-1, e) in listed for e in range(problem.experts)]
            for layer in problem.loads.layers
        ]
    )


def _new(problem: Problem, held: _Held) -> BoolArray:
    """Which of what the GPUs hold was not live there, shape [P]."""
    if problem.current is None:
        return np.ones(len(held.layer_P), dtype=np.bool_)
    x, g, c = np.nonzero(problem.current.slots_LGC >= 0)
    live = (x * problem.topology.gpus + g) * problem.experts + problem.current.slots_LGC[x, g, c]
    there = np.zeros(problem.layers * problem.topology.gpus * problem.experts, dtype=np.bool_)
    there[live] = True
    return np.asarray(~there[held.key_P])


def _moves(problem: Problem, plan: Plan, held: _Held) -> list[str]:
    claimed = plan.moves
    new_P = _new(problem, held)
    count_L = np.bincount(held.layer_P[new_P], minlength=problem.layers)
    used = held.used_LG
    moved, size = int(count_L.sum()), int(count_L @ problem.bytes_L)
    found = []
    if (claimed.count, claimed.bytes) != (moved, size):
        found.append(
            f"plan claims {claimed.count} moves of {claimed.bytes} bytes, it makes {moved} of {size}"
        )
    elif claimed.count_L.shape != count_L.shape or (claimed.count_L != count_L).any():
        found.append("the plan's moves by layer are not those that it makes")
    if claimed.cold != (problem.current is None):
        found.append(f"plan claims cold={claimed.cold}, the problem says the opposite")
    if abs(claimed.fraction - moved / max(int(used.sum()), 1)) > TOLERANCE:
        found.append(
            f"plan claims to move {claimed.fraction:.6g} of its replicas, it moves {moved} of {used.sum()}"
        )
    limits = problem.limits
    if problem.current is not None and limits.bounds_moves:
        if limits.max_moves is not None and moved > limits.max_moves:
            found.append(f"{moved} replicas move, at most {limits.max_moves} may")
        if limits.max_move_bytes is not None and size > limits.max_move_bytes:
            found.append(f"{size} bytes move, at most {limits.max_move_bytes} may")
        if limits.max_layer_moves is not None and count_L.max() > limits.max_layer_moves:
            found.append(f"{count_L.max()} replicas move in one layer, at most {limits.max_layer_moves} may")
        if limits.max_move_seconds is not None:
            least = _least_seconds(problem, held, new_P)
            if least > limits.max_move_seconds * (1 + TOLERANCE):
                found.append(
                    f"moves take {least:.6g} s at least, at most {limits.max_move_seconds:.6g} s are allowed"
                )
    return found


def _least_seconds(problem: Problem, held: _Held, new_P: BoolArray) -> float:
    """Seconds that no schedule of the moves can beat: the busiest receiver's bytes over all its links."""
    links = problem.topology.links
    bytes_G = problem.bytes_L @ held.by_gpu(new_P)
    return float(bytes_G.max()) / (links.intra_node + links.inter_node + links.host)


def _claims(problem: Problem, plan: Plan, held: _Held) -> list[str]:
    """Compare the plan's own figures with the recomputed ones."""
    tokens, active, found = _served(problem, plan, held)
    model: TimeModel = problem.time
    speed = problem.topology.speed_G
    usable = problem.capacity_LG > 0  # a GPU without room is dead: it takes no time and counts in no mean
    with np.errstate(over="ignore", invalid="ignore"):
        time = np.asarray(model.time(tokens, tokens if model.counts_tokens_only else active, speed))
        time = np.where(usable, time, 0.0)
        weight = np.where(usable, speed / speed.max(), 0.0)
        mean = (time * weight).sum(2) / np.maximum(weight.sum(1), 1e-300)
        if problem.objective.risk == "covariance":  # how far each GPU strays, not the slowest ones
            top = _over_scenarios(problem, time).max(1)
        else:
            top = _over_scenarios(problem, time.max(2))
        work = _over_scenarios(problem, mean)
        ratio = np.where(work > 0, top / np.where(work > 0, work, 1.0), 1.0)
    if not (np.isfinite(top).all() and np.isfinite(ratio).all()):
        return [*found, "the plan's times are not finite: loads, time model and speeds are out of range"]
    usual = time[0]
    if len(time) > 1:
        served_P = held.share_P * problem.load_LE[held.layer_P, held.expert_P]
        mean = model.time(held.by_gpu(served_P), held.by_gpu(served_P > 0), speed)
        usual = np.where(usable, mean, 0.0)
    if plan.time_LG.shape != usual.shape or _apart(plan.time_LG, usual, usual.max(1)[:, None]):
        found.append("the plan's GPU times are not those of its shares")
    if plan.imbalance_L.shape != ratio.shape or _apart(plan.imbalance_L, ratio, np.ones(len(ratio))):
        found.append("the plan's imbalance is not that of its shares")
    bound, value = plan.certificate.lower_bound_L, plan.certificate.value_L
    if bound.shape != (problem.layers,) or value.shape != (problem.layers,):
        return [*found, "the certificate does not cover every layer"]
    if _apart(value, top, top):
        found.append("the certificate's values are not the plan's largest GPU times")
    if not (bound >= 0).all():
        found.append("the certificate's bounds are no numbers of at least 0")
    over = bound > value * (1 + PROVEN)
    if over.any():
        x, names = int(np.argmax(over)), plan.certificate.bound_L
        found.append(
            f"layer {problem.loads.layers[x]}: lower bound {bound[x]:.9g} "
            f"({names[x] if x < len(names) else 'unnamed'}) is above the plan's own {value[x]:.9g}"
        )
    return found


def _apart(claimed: FloatArray, right: FloatArray, scale: FloatArray) -> bool:
    """Whether a claim is further off than the tolerance; what is no number is."""
    return not bool((np.abs(claimed - right) <= TOLERANCE * scale).all())


def _over_scenarios(problem: Problem, value: FloatArray) -> FloatArray:
    """Values of every scenario, [T, ...], as one by the problem's risk."""
    wish, weight = problem.objective, problem.loads.weight_T
    count = len(value)
    if count == 1:
        return np.asarray(value[0])
    share = np.full(count, 1.0 / count) if weight is None else weight
    if wish.risk == "worst":
        return np.asarray(value.max(0))
    if wish.risk == "covariance":
        middle = np.tensordot(share, value, 1)
        spread = np.sqrt(sum(p * (part - middle) ** 2 for p, part in zip(share, value, strict=True)))
        return np.asarray(middle + wish.sigma * spread)
    if wish.risk == "sigma":
        middle = np.tensordot(share, value, 1)
        square = np.tensordot(share, np.where(value > middle, value - middle, 0.0) ** 2, 1)
        return np.asarray(middle + wish.sigma * square**0.5)
    tail = 1.0 if wish.risk == "expected" else 1.0 - wish.cvar_alpha
    left = np.full(value.shape[1:], tail)
    total = np.zeros(value.shape[1:])
    order = np.argsort(-value, axis=0, kind="stable")
    for rank in order:  # the worst first, until the tail is full
        taken = np.minimum(share[rank], left)
        total += taken * np.take_along_axis(value, rank[None], axis=0)[0]
        left -= taken
    return np.asarray(total / tail)


_NOT_SHARES = "shares must be finite and at least 0"
_NO_LIMITS = Problem.__dataclass_fields__["limits"].default


def check_slots(slots_GC: SlotArray, experts: int, capacity_G: IntArray, *, copies: bool = False) -> None:
    """Raise unless slots place a layer: known experts, each somewhere, none twice on a GPU, all fit.

    With `copies` an expert may be on a GPU several times.

    Raises
    ------
    InvalidPlanError
        Naming what is broken.
    """
    if slots_GC.size == 0 or int(slots_GC.min()) < -1 or int(slots_GC.max()) >= experts:
        raise InvalidPlanError([f"slots hold an expert outside -1..{experts - 1}"])
    found = []
    ordered = np.sort(slots_GC, axis=1)
    if not copies and ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
        found.append("an expert sits on a GPU twice")
    count_E = np.bincount(slots_GC.ravel() + 1, minlength=experts + 1)[1:]
    if not count_E.all():
        found.append(f"expert {int((count_E > 0).argmin())} has no replica")
    used_G = (slots_GC >= 0).sum(1)
    if (used_G > capacity_G).any():
        gpu = int((used_G > capacity_G).argmax())
        found.append(
            f"GPU {gpu} holds more replicas than fit: {used_G[gpu]}, it has room for {capacity_G[gpu]}"
        )
    if found:
        raise InvalidPlanError(found)
