"""First aid after a loss: every expert has a replica again, by the fewest moves, in milliseconds.

An expert that nobody holds must be loaded once, whatever else is done; so as many loads as there are such
experts are both needed and enough wherever the slots suffice. Heaviest first, each goes to the GPU with least
to do for its speed: into a free slot while there are any, then that of the lightest replica of an expert that
has others. All layers take a step at once. Where limits ask for more (domains, pins, replicas), a cheapest
flow finds the fewest replicas that make up for it, layer by layer.

References
----------
Coverage before balance is how elastic systems restart: Lazarus (Wu et al. 2024, arXiv 2407.04656) and
Tarragon (2026) first see to it that no expert is missing.
"""

from __future__ import annotations

import numpy as np

from moeless_opt.problems.arrays import FloatArray, IntArray, SlotArray
from moeless_opt.problems.errors import InfeasibleError, UnsupportedFeatureError
from moeless_opt.problems.spec import Fill, Problem, SizingPolicy, replica_counts
from moeless_opt.solvers.core import Built, Heuristic, NoOptions, Task, in_entries, keeps_limits, only_moves
from moeless_opt.solvers.limits import full_within, mended_within, rules_of
from moeless_opt.solvers.replan.live import broken_moves, layer_moves, live_slots
from moeless_opt.solvers.shares import best_shares

__all__ = ["Cover", "covered"]


def covered(
    load_LE: FloatArray, live_LGC: SlotArray, capacity_LG: IntArray, speed_G: FloatArray
) -> SlotArray:
    """A placement in which every expert has a replica, with the fewest new ones, shape [L, G, C].

    Parameters
    ----------
    load_LE : array, shape [L, E]
        Tokens.
    live_LGC : array of int32, shape [L, G, C]
        What is live, each GPU within its slots; those that are full come first.
    capacity_LG : array of int, shape [L, G]
        Slots of each GPU, in all at least E in every layer.
    speed_G : array, shape [G]
        Relative speeds.
    """
    layers, gpus, wide = live_LGC.shape
    experts = load_LE.shape[1]
    slots_LS = live_LGC.reshape(layers, -1).copy()  # S slots of all GPUs, one after the other
    count_LE = replica_counts(live_LGC, experts).astype(np.int64)
    missing_LE = count_LE == 0
    missing_L = missing_LE.sum(1)
    if not missing_L.any():
        return live_LGC.copy()
    # Where each expert's replicas are: slots in order of their experts, and where an expert's begin.
    by_expert_LS = np.argsort(slots_LS, axis=1, kind="stable")
    begin_LE = np.cumsum(count_LE, axis=1) - count_LE + (slots_LS < 0).sum(1)[:, None]
    most = np.arange(int(count_LE.max()))
    first_LE = count_LE.copy()
    held_LS = slots_LS >= 0
    expert_LS = np.maximum(slots_LS, 0)
    row_L = np.arange(layers)[:, None]
    piece_LE = load_LE / np.maximum(count_LE, 1)
    piece_LS = np.where(held_LS, piece_LE[row_L, expert_LS], 0.0)
    busy_LG = piece_LS.reshape(live_LGC.shape).sum(2) / speed_G
    open_LS = ~held_LS & (np.arange(gpus * wide) % wide < np.repeat(capacity_LG, wide, axis=1))
    spare_LS = held_LS & (count_LE[row_L, expert_LS] > 1)
    open_LG, spare_LG = (part.reshape(live_LGC.shape).sum(2) for part in (open_LS, spare_LS))
    order_LE = np.argsort(np.where(missing_LE, -load_LE, np.inf), axis=1, kind="stable")
    for turn in range(int(missing_L.max())):
        rows = np.flatnonzero(missing_L > turn)
        comes_R = order_LE[rows, turn]
        free_R = open_LG[rows].any(1)
        room_RG = np.where(free_R[:, None], open_LG[rows], spare_LG[rows]) > 0
        gpu_R = np.where(room_RG, busy_LG[rows], np.inf).argmin(1)
        at_RC = gpu_R[:, None] * wide + np.arange(wide)
        fits_RC = np.where(free_R[:, None], open_LS[rows[:, None], at_RC], spare_LS[rows[:, None], at_RC])
        slot_R = gpu_R * wide + np.where(fits_RC, piece_LS[rows[:, None], at_RC], np.inf).argmin(1)
        gone_R = slots_LS[rows, slot_R]
        lost_R = np.where(free_R, 0.0, piece_LS[rows, slot_R])
        slots_LS[rows, slot_R] = comes_R
        open_LS[rows, slot_R] = spare_LS[rows, slot_R] = False
        open_LG[rows, gpu_R] -= free_R
        spare_LG[rows, gpu_R] -= ~free_R
        piece_LS[rows, slot_R] = load_LE[rows, comes_R]
        busy_LG[rows, gpu_R] += (load_LE[rows, comes_R] - lost_R) / speed_G[gpu_R]
        # The others take over what the dropped replica served.
        x, gone = rows[~free_R], gone_R[~free_R]
        count_LE[x, gone] -= 1
        k_XK = np.minimum(begin_LE[x, gone][:, None] + most, gpus * wide - 1)
        s_XK = by_expert_LS[x[:, None], k_XK]
        there_XK = (most < first_LE[x, gone][:, None]) & (slots_LS[x[:, None], s_XK] == gone[:, None])
        i, k = np.nonzero(there_XK)
        x_P, s_P = x[i], s_XK[i, k]
        more_P = (lost_R[~free_R] / count_LE[x, gone])[i]
        piece_LS[x_P, s_P] += more_P
        np.add.at(busy_LG, (x_P, s_P // wide), more_P / speed_G[s_P // wide])
        last_P = count_LE[x, gone][i] == 1
        spare_LS[x_P[last_P], s_P[last_P]] = False
        np.subtract.at(spare_LG, (x_P[last_P], s_P[last_P] // wide), 1)
    return slots_LS.reshape(live_LGC.shape)


def covered_in_bytes(problem: Problem, live_LGC: SlotArray) -> SlotArray:
    """The same where all layers share the GPUs' bytes (sizing ``memory``), shape [L, G, C].

    Large replicas first; where no GPU has room for one, the replicas that serve least go on the GPU where
    that is least, of whatever layer, as long as their experts have others.

    Raises
    ------
    InfeasibleError
        If there is no room in this way; with layers of unequal bytes there may be in another.
    """
    load_LE, speed_G, size_L = problem.load_LE, problem.topology.speed_G, problem.bytes_L
    memory_G = problem.topology.memory_G
    assert memory_G is not None
    layers, gpus, wide = live_LGC.shape
    missing_LE = replica_counts(live_LGC, problem.experts) == 0
    # GPUs first: each is asked for the replica that serves least, of all layers.
    slots_GLC = np.full((gpus, layers, wide + int(missing_LE.sum(1).max())), -1, dtype=np.int32)
    slots_GLC[:, :, :wide] = live_LGC.transpose(1, 0, 2)
    count_LE = replica_counts(live_LGC, problem.experts).astype(np.int64)
    left_G = memory_G - size_L @ (live_LGC >= 0).sum(2)
    part_LE = load_LE / np.maximum(load_LE.sum(1, keepdims=True) / speed_G.sum(), 1e-300)
    row_L, held_GLC = np.arange(layers)[:, None], slots_GLC >= 0
    expert_GLC = np.maximum(slots_GLC, 0)
    served_GLC = np.where(
        held_GLC & (count_LE[row_L, expert_GLC] > 1),
        (part_LE / np.maximum(count_LE, 1))[row_L, expert_GLC],
        np.inf,
    )
    missing = sorted(
        zip(*(part.tolist() for part in np.nonzero(missing_LE)), strict=True),
        key=lambda pair: (-size_L[pair[0]], -part_LE[pair], pair),
    )
    for layer, expert in missing:
        size, slots_GC = int(size_L[layer]), slots_GLC[:, layer]
        fits_G = left_G >= size
        if fits_G.any():
            piece_E = part_LE[layer] / np.maximum(count_LE[layer], 1)
            busy_G = np.where(slots_GC >= 0, piece_E[np.maximum(slots_GC, 0)], 0.0).sum(1) / speed_G
            gpu = int(np.where(fits_G, busy_G, np.inf).argmin())
        else:
            gpu, gone = _least_served(served_GLC, size_L, size - left_G)
            if not gone:
                raise InfeasibleError(
                    f"memory: no GPU has {size} bytes for expert {expert} of layer "
                    f"{problem.loads.layers[layer]}, nor replicas of others to spare"
                )
            for x, slot in gone:
                other = int(slots_GLC[gpu, x, slot])
                slots_GLC[gpu, x, slot], served_GLC[gpu, x, slot] = -1, np.inf
                left_G[gpu] += size_L[x]
                count_LE[x, other] -= 1
                now = part_LE[x, other] / count_LE[x, other] if count_LE[x, other] > 1 else np.inf
                served_GLC[:, x][slots_GLC[:, x] == other] = now
        slots_GC[gpu, int((slots_GC[gpu] < 0).argmax())] = expert
        count_LE[layer, expert] = 1
        left_G[gpu] -= size
    width = max(int((slots_GLC >= 0).sum(2).max()), 1)
    order = np.argsort(slots_GLC < 0, axis=2, kind="stable")
    return np.ascontiguousarray(np.take_along_axis(slots_GLC, order, axis=2)[:, :, :width].transpose(1, 0, 2))


def _least_served(
    served_GLC: FloatArray, size_L: IntArray, lack_G: IntArray
) -> tuple[int, list[tuple[int, int]]]:
    """A GPU, and (layer, slot) of its replicas that serve least and free the bytes that it lacks; or none.

    What a replica serves is infinite where its expert has no other.
    """
    best, chosen, cost = list[tuple[int, int]](), 0, np.inf
    least_G = served_GLC.min((1, 2))
    for gpu in np.argsort(least_G, kind="stable").tolist():
        if least_G[gpu] >= cost:
            break
        x_P, slot_P = np.nonzero(np.isfinite(served_GLC[gpu]))
        served_P = served_GLC[gpu, x_P, slot_P]
        gone, total, freed = list[tuple[int, int]](), 0.0, 0
        for p in np.argsort(served_P / size_L[x_P], kind="stable").tolist():
            if freed >= lack_G[gpu]:
                break
            gone.append((int(x_P[p]), int(slot_P[p])))
            total, freed = total + float(served_P[p]), freed + int(size_L[x_P[p]])
        if freed >= lack_G[gpu] and total < cost:
            best, chosen, cost = gone, gpu, total
    return chosen, best


class Cover(Heuristic):
    """Every expert a replica again, and as many as the limits ask for, by the fewest moves."""

    name = "cover"
    summary = (
        "after a loss: every expert a replica (in as many domains as asked) by the fewest moves, at once"
    )

    def build(self, task: Task[NoOptions]) -> Built:
        """Bring back what is missing; then what the limits still ask for."""
        problem = task.problem
        live_LGC = live_slots(problem)
        if problem.sizing.policy == SizingPolicy.MEMORY:
            if problem.limits != only_moves(problem.limits):
                raise UnsupportedFeatureError(
                    "solver 'cover': limits beside the sizing 'memory' are not supported"
                )
            slots_LGC = covered_in_bytes(problem, live_LGC)
            _check_moves(problem, slots_LGC, live_LGC)
            share_LGC = in_entries(problem, problem.load_LE, slots_LGC, best_shares(problem, slots_LGC))
            return Built(slots_LGC=slots_LGC, share_LGC=share_LGC)
        slots_LGC = covered(problem.load_LE, live_LGC, problem.capacity_LG, problem.topology.speed_G)
        broken_L = ~keeps_limits(problem, slots_LGC, tied=False)
        if broken_L.any():
            slots_LGC = _within(problem, live_LGC, slots_LGC, np.flatnonzero(broken_L))
        slots_LGC = _full(problem, live_LGC, slots_LGC)
        if (
            problem.limits.bounds_moves
            and broken_moves(problem, slots_LGC, live_LGC)[0] == "max_move_seconds"
        ):
            slots_LGC = _full(problem, live_LGC, _quick(problem, live_LGC))
        _check_moves(problem, slots_LGC, live_LGC)
        share_LGC = in_entries(problem, problem.load_LE, slots_LGC, best_shares(problem, slots_LGC))
        return Built(slots_LGC=slots_LGC, share_LGC=share_LGC)


def _within(problem: Problem, live_LGC: SlotArray, slots_LGC: SlotArray, rows: IntArray) -> SlotArray:
    """Layers that break a limit, within it by the fewest replicas that are not live."""
    slots_LGC, rules, speed_G = slots_LGC.copy(), rules_of(problem), problem.topology.speed_G
    for row in rows.tolist():
        content = [[e for e in held if e >= 0] for held in live_LGC[row].tolist()]
        found = mended_within(rules[row], problem.load_LE[row], content, speed_G)
        slots_LGC[row] = -1
        for gpu, held in enumerate(found):
            slots_LGC[row, gpu, : len(held)] = held
    return slots_LGC


def _full(problem: Problem, live_LGC: SlotArray, slots_LGC: SlotArray) -> SlotArray:
    """Coverage with full slots where `fill` asks for them, by the fewest further moves."""
    if problem.fill == Fill.NONE:
        return slots_LGC
    limits = problem.limits
    # Whoever fills slots minds the moves first where they are bounded.
    few = problem.replace(limits=limits.replace(max_moves=int(problem.capacity_LG.sum())))
    full_LGC = full_within(few, slots_LGC)
    if limits == only_moves(limits) or not (live_LGC >= 0).any():
        return full_LGC
    # Coverage may have dropped what a full layer can keep.
    direct_LGC = full_within(few, live_LGC)
    fewer_L = layer_moves(problem, direct_LGC, live_LGC) < layer_moves(problem, full_LGC, live_LGC)
    return np.where(fewer_L[:, None, None], direct_LGC, full_LGC)


def _quick(problem: Problem, live_LGC: SlotArray) -> SlotArray:
    """Coverage by the fewest moves, spread over the GPUs that receive them; large replicas first."""
    slots_LGC, rules, speed_G = np.full_like(live_LGC, -1), rules_of(problem), problem.topology.speed_G
    size_L = np.maximum(problem.bytes_L, 1)
    come_G = np.zeros(problem.topology.gpus, dtype=np.int64)
    for row in np.argsort(-size_L, kind="stable").tolist():
        content = [[e for e in held if e >= 0] for held in live_LGC[row].tolist()]
        found = mended_within(rules[row], problem.load_LE[row], content, speed_G, come_G // size_L[row])
        for gpu, held in enumerate(found):
            slots_LGC[row, gpu, : len(held)] = held
            come_G[gpu] += size_L[row] * len(set(held).difference(content[gpu]))
    return slots_LGC


def _check_moves(problem: Problem, slots_LGC: SlotArray, live_LGC: SlotArray) -> None:
    """Refuse where fewer may move than must, or coverage takes longer than may be."""
    limits = problem.limits
    if not limits.bounds_moves:
        return
    name, used = broken_moves(problem, slots_LGC, live_LGC)
    if not name:
        return
    # More moves over other links may be sooner still: of seconds that is all that is known.
    if name == "max_move_seconds":
        takes = f"the coverage with the fewest moves that was found takes {used:.9g}"
    else:
        takes = f"{used:.9g} are needed to give every expert a replica"
    raise InfeasibleError(f"limits.{name}: is {getattr(limits, name)}; {takes}")
