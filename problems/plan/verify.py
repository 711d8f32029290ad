"""The verifier: recomputes everything about a plan from the problem alone.

It shares no code with the solvers nor with ``evaluate``: where those gather along slots, this scatters
into dense (expert, GPU) tables. A plan that it accepts is valid whatever found it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray, SlotArray
from moeless_opt.problems.errors import InvalidPlanError
from moeless_opt.problems.plan.plan import PROVEN, Plan
from moeless_opt.problems.spec import Problem, TimeModel

__all__ = ["check_slots", "verify", "violations"]

TOLERANCE = 1e-6
_MOST = 5  # examples listed of each kind
_CELLS = 1 << 21  # entries of a table, 16 MB of floats: much more does not stay in the processor's cache


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

    Checked: shapes and expert ids, no expert twice on a GPU, coverage, slots, memory, token shares
    (and that an equal split is equal), replica limits, pinned and forbidden pairs, failure domains,
    moves and their limits, and the plan's own claims: times, imbalance, moves, bounds.
    """
    slots, share = plan.slots_LGC, plan.share_LGC
    layers, experts, gpus = problem.layers, problem.experts, problem.topology.gpus
    if slots.ndim != 3 or slots.shape[:2] != (layers, gpus):
        return [f"slots have shape {slots.shape}, the problem has {layers} layers and {gpus} GPUs"]
    if share.shape != slots.shape:
        return [f"shares have shape {share.shape}, the slots {slots.shape}"]
    if slots.size == 0 or int(slots.min()) < -1 or int(slots.max()) >= experts:
        return [f"slots hold an expert outside -1..{experts - 1}"]
    # Tables of (layer, GPU, expert) are made for a few layers at a time; limits look at all layers at once.
    step = layers if problem.limits is not _NO_LIMITS else max(_CELLS // (gpus * (experts + 1)), 1)
    parts = [_Tables.of(problem, plan, low, min(low + step, layers)) for low in range(0, layers, step)]
    found = [text for part in parts for text in part.found]
    if any(part.hopeless for part in parts):
        return found
    used = np.concatenate([part.used for part in parts])
    found += _memory(problem, used)
    if plan.split != problem.split:
        found.append(f"plan has a {plan.split} split, the problem asks for {problem.split}")
    if problem.limits is not _NO_LIMITS:
        found += _limits(problem, parts[0].count > 0, np.asarray(parts[0].count.sum(1)))
    found += _moves(problem, plan, parts, used)
    return found + _claims(problem, plan, parts)


@dataclass(slots=True)
class _Tables:
    """What dense tables of some layers say.

    Parameters
    ----------
    found : list of str
        Rules broken.
    used : array, shape [L, G]
        Filled slots.
    tokens, active : arrays, shape [L, G]
        Tokens served, and replicas that serve any.
    moved_L : array, shape [L]
        Replicas that were not live.
    count : array, shape [L, G, E]
        Replicas; empty unless limits need it.
    new : array of bool, shape [L, G, E]
        Those of them that move; likewise.
    hopeless : bool
        Whether shares are so wrong that there is no point in going on.
    """

    found: list[str]
    used: IntArray
    tokens: FloatArray
    active: IntArray
    moved_L: IntArray
    count: IntArray
    new: BoolArray
    hopeless: bool = False

    @classmethod
    def of(cls, problem: Problem, plan: Plan, low: int, high: int) -> _Tables:
        """Check layers `low` to `high`, without the last."""
        slots, share = plan.slots_LGC[low:high], plan.share_LGC[low:high]
        layers, experts, gpus = problem.loads.layers[low:high], problem.experts, problem.topology.gpus
        found: list[str] = []
        # One cell per (layer, GPU, expert); an empty slot (-1) falls into a column of its own.
        size = len(slots) * gpus * (experts + 1)
        cell = (slots + np.arange(1, size, experts + 1).reshape(-1, gpus, 1)).ravel()
        count = np.bincount(cell, minlength=size).reshape(-1, gpus, experts + 1)[:, :, 1:]
        if int(count.max()) > 1:
            found += [
                f"layer {layers[x]} GPU {g}: expert {e} sits there {count[x, g, e]} times"
                for x, g, e in np.argwhere(count > 1)[:_MOST]
            ]
        replicas = count.sum(1)
        if int(replicas.min()) < problem.limits.min_replicas:
            short = np.argwhere(replicas < problem.limits.min_replicas)
            found += [
                f"layer {layers[x]}: expert {e} has {replicas[x, e]} replicas, "
                f"needs {problem.limits.min_replicas}"
                for x, e in short[:_MOST]
            ]
        used = count.sum(2)
        capacity = problem.capacity_LG[low:high]
        if (used > capacity).any():
            found += [
                f"layer {layers[x]} GPU {g}: {used[x, g]} replicas, room for {capacity[x, g]}"
                for x, g in np.argwhere(used > capacity)[:_MOST]
            ]
        if not (float(share.min()) >= -TOLERANCE and float(share.max()) < np.inf):
            found.append("shares must be finite and at least 0")
            nothing = np.zeros(0)
            return cls(found, used, nothing, nothing.astype(int), nothing.astype(int), count, count > 0, True)
        scattered = np.asarray(np.bincount(cell, weights=share.ravel(), minlength=size), dtype=np.float64)
        part = scattered.reshape(-1, gpus, experts + 1)
        if part[:, :, 0].any():
            found.append("an empty slot has a token share")
        part = part[:, :, 1:]
        off = np.abs(part.sum(1) - 1.0)
        if float(off.max()) > TOLERANCE:
            found += [
                f"layer {layers[x]}: the shares of expert {e} sum to {part[x, :, e].sum():.9g}, not 1"
                for x, e in np.argwhere(off > TOLERANCE)[:_MOST]
            ]
        if problem.split == "equal":
            found += _uneven(slots, part, count, replicas, capacity, layers)
        new = count > 0
        if problem.current is not None:
            x, g, c = np.nonzero(problem.current.slots_LGC[low:high] >= 0)
            new[x, g, problem.current.slots_LGC[low:high][x, g, c]] = False
        served = part * problem.load_LE[low:high, None, :]
        tokens = served.sum(2)
        needs_active = not problem.time.counts_tokens_only
        active = ((served > 0) & (count > 0)).sum(2) if needs_active else np.zeros_like(used)
        moved_L = new.sum((1, 2))
        if problem.limits is _NO_LIMITS:  # nobody asks for the tables
            count, new = count[:0].copy(), new[:0].copy()
        return cls(found, used, tokens, active, moved_L, count, new)


def _uneven(
    slots: SlotArray,
    part: FloatArray,
    count: IntArray,
    replicas: IntArray,
    capacity: IntArray,
    layers: tuple[int, ...],
) -> list[str]:
    """Where an equal split is not equal."""
    layer, gpu, slot = np.nonzero(slots >= 0)
    expert = slots[layer, gpu, slot]
    even = count[layer, gpu, expert] / np.maximum(replicas, 1)[layer, expert]
    off = np.abs(part[layer, gpu, expert] - even)
    uneven = np.zeros(replicas.shape, dtype=np.bool_)
    np.logical_or.at(uneven, (layer, expert), off > TOLERANCE)
    if not uneven.any() or _even_over_slots(part, uneven, replicas, capacity):
        return []
    worst = int(off.argmax())
    x, g, e = layer[worst], gpu[worst], expert[worst]
    return [
        f"layer {layers[x]} GPU {g}: expert {e} has share {part[x, g, e]:.6g}, "
        f"an equal split gives {even[worst]:.6g}"
    ]


def _even_over_slots(part: FloatArray, uneven: BoolArray, replicas: IntArray, capacity: IntArray) -> bool:
    """Whether uneven shares are an even split over slots, several of which are one copy on one GPU.

    EPLB may fill two slots of a GPU with one expert. Its tokens are divided over the slots, so that GPU gets
    2/r of them, from the single copy that it needs. Such shares are multiples of 1/r, and the slots suffice.
    """
    slots: IntArray = (part > 0).astype(np.int64)  # [L, G, E]
    for x, e in np.argwhere(uneven):
        gpus = np.flatnonzero(part[x, :, e])
        if len(gpus) < replicas[x, e]:
            return False
        shares = part[x, gpus, e]
        counts = np.arange(replicas[x, e], capacity[x].sum() + 1)
        whole = np.abs(shares * counts[:, None] - np.rint(shares * counts[:, None])).max(1) < 1e-9
        if not whole.any():
            return False
        slots[x, gpus, e] = np.rint(shares * counts[int(whole.argmax())])
    return bool((slots.sum(2) <= capacity).all())


def _memory(problem: Problem, used: IntArray) -> list[str]:
    memory = problem.topology.memory_G
    if memory is None:
        return []
    need = problem.bytes_L @ used
    return [
        f"GPU {g}: {int(need[g])} bytes of experts, room for {int(memory[g])}"
        for g in np.flatnonzero(need > memory)
    ]


def _limits(problem: Problem, has: BoolArray, replicas: IntArray) -> list[str]:
    limits, found = problem.limits, []
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
        domain = problem.topology.failure_domain_G
        reach = np.stack([has[:, domain == d].any(1) for d in np.unique(domain)]).sum(0)
        found += [
            f"layer {problem.loads.layers[x]}: expert {e} is in {reach[x, e]} failure domains, "
            f"must be in {limits.spread}"
            for x, e in np.argwhere(reach < limits.spread)[:_MOST]
        ]
    for layer, expert, gpu in limits.pinned:
        for x, number in enumerate(problem.loads.layers):
            if layer in (-1, number) and not has[x, gpu, expert]:
                found.append(f"layer {number}: expert {expert} is pinned to GPU {gpu} and is not there")
    for layer, expert, gpu in limits.forbidden:
        for x, number in enumerate(problem.loads.layers):
            if layer in (-1, number) and has[x, gpu, expert]:
                found.append(f"layer {number}: expert {expert} is forbidden on GPU {gpu} and is there")
    return found


def _moves(problem: Problem, plan: Plan, parts: list[_Tables], used: IntArray) -> list[str]:
    claimed = plan.moves
    count_L = np.concatenate([part.moved_L for part in parts])
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
            least = _least_seconds(problem, parts[0].new)
            if least > limits.max_move_seconds * (1 + TOLERANCE):
                found.append(
                    f"moves take {least:.6g} s at least, at most {limits.max_move_seconds:.6g} s are allowed"
                )
    return found


def _least_seconds(problem: Problem, new: BoolArray) -> float:
    """Seconds that no schedule of the moves can beat: the busiest receiver's bytes over all its links."""
    links = problem.topology.links
    bytes_G = (new.sum(2) * problem.bytes_L[:, None]).sum(0)
    return float(bytes_G.max()) / (links.intra_node + links.inter_node + links.host)


def _claims(problem: Problem, plan: Plan, parts: list[_Tables]) -> list[str]:
    """Compare the plan's own figures with the recomputed ones."""
    tokens = np.concatenate([part.tokens for part in parts])
    active = np.concatenate([part.active for part in parts])
    model: TimeModel = problem.time
    speed = problem.topology.speed_G
    time = np.asarray(model.time(tokens, tokens if model.counts_tokens_only else active, speed))
    top = time.max(1)
    found = []
    if plan.time_LG.shape != time.shape or (np.abs(plan.time_LG - time).max(1) > TOLERANCE * top).any():
        found.append("the plan's GPU times are not those of its shares")
    work = time @ (speed / speed.sum())
    ratio = np.where(work > 0, top / np.where(work > 0, work, 1.0), 1.0)
    if plan.imbalance_L.shape != ratio.shape or np.abs(plan.imbalance_L - ratio).max() > TOLERANCE:
        found.append("the plan's imbalance is not that of its shares")
    bound, value = plan.certificate.lower_bound_L, plan.certificate.value_L
    if bound.shape != (problem.layers,) or value.shape != (problem.layers,):
        return [*found, "the certificate does not cover every layer"]
    if (np.abs(value - top) > TOLERANCE * top).any():
        found.append("the certificate's values are not the plan's largest GPU times")
    over = bound > value * (1 + PROVEN)
    if over.any():
        x, names = int(np.argmax(over)), plan.certificate.bound_L
        found.append(
            f"layer {problem.loads.layers[x]}: lower bound {bound[x]:.9g} "
            f"({names[x] if x < len(names) else 'unnamed'}) is above the plan's own {value[x]:.9g}"
        )
    return found


_NO_LIMITS = Problem.__dataclass_fields__["limits"].default


def check_slots(slots_GC: SlotArray, experts: int, capacity_G: IntArray) -> None:
    """Raise unless slots place a layer: known experts, each somewhere, none twice on a GPU, all fit.

    Raises
    ------
    InvalidPlanError
        Naming what is broken.
    """
    if slots_GC.size == 0 or int(slots_GC.min()) < -1 or int(slots_GC.max()) >= experts:
        raise InvalidPlanError([f"slots hold an expert outside -1..{experts - 1}"])
    gpus = len(slots_GC)
    cell = (slots_GC + 1 + np.arange(gpus)[:, None] * (experts + 1)).ravel()
    count_GE = np.bincount(cell, minlength=gpus * (experts + 1)).reshape(gpus, experts + 1)[:, 1:]
    found = []
    if count_GE.max() > 1:
        found.append("an expert sits on a GPU twice")
    if not count_GE.any(0).all():
        found.append(f"expert {int(count_GE.any(0).argmin())} has no replica")
    if (count_GE.sum(1) > capacity_G).any():
        found.append("a GPU holds more replicas than fit")
    if found:
        raise InvalidPlanError(found)
