"""The verifier against a second one, replica by replica in plain Python: the same words for a plan."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest

from moeless_opt.problems.errors import InvalidPlanError
from moeless_opt.problems.plan.plan import Plan
from moeless_opt.problems.plan.verify import check_slots, violations
from moeless_opt.problems.spec.loads import Loads
from moeless_opt.problems.spec.placement import Placement
from moeless_opt.problems.spec.problem import Problem
from moeless_opt.problems.spec.time_model import TimeModel
from moeless_opt.problems.spec.topology import Links, Topology
from moeless_opt.problems.spec.wishes import Limits
from tests.oracles.enumeration import wanted_domains
from tests.strategies import full_slots, plan_of, random_shares, random_slots, slow_time

SLACK = 1e-6
LISTED = 5


class Judge:
    """Every rule that a plan breaks, found with loops over layers, GPUs and slots."""

    def __init__(self, problem: Problem, plan: Plan) -> None:
        self.problem, self.plan = problem, plan
        self.L, self.E, self.G = problem.layers, problem.experts, problem.topology.gpus
        self.layer = problem.loads.layers
        slots, share = plan.slots_LGC.tolist(), plan.share_LGC.tolist()
        self.share: list[list[dict[int, float]]] = []
        self.count: list[list[Counter[int]]] = []
        self.stray = False
        for x in range(self.L):
            self.share.append([{} for _ in range(self.G)])
            self.count.append([Counter() for _ in range(self.G)])
            for g in range(self.G):
                for e, part in zip(slots[x][g], share[x][g], strict=True):
                    if e < 0:
                        self.stray |= part != 0
                        continue
                    self.count[x][g][e] += 1
                    self.share[x][g][e] = self.share[x][g].get(e, 0.0) + part
        self.replicas = [[sum(c[e] for c in self.count[x]) for e in range(self.E)] for x in range(self.L)]
        self.used = [[sum(c.values()) for c in self.count[x]] for x in range(self.L)]
        old = None if problem.current is None else problem.current.slots_LGC.tolist()
        self.new = [
            [{e for e in self.count[x][g] if old is None or e not in old[x][g]} for g in range(self.G)]
            for x in range(self.L)
        ]

    def found(self) -> list[str]:
        """In the verifier's order."""
        said = self.tables()
        if any("finite" in text for text in said):
            return said
        said += self.memory()
        if self.plan.split != self.problem.split:
            said.append(f"plan has a {self.plan.split} split, the problem asks for {self.problem.split}")
        return said + self.limits() + self.moves() + self.claims()

    def tables(self) -> list[str]:
        """Rules on the placement and the shares."""
        least = self.problem.limits.min_replicas
        twice, short, over, short_of, off = [], [], [], [], []
        for x in range(self.L):
            for g in range(self.G):
                for e, n in sorted(self.count[x][g].items()):
                    if n > 1 and self.problem.fill != "copies":
                        twice.append(f"layer {self.layer[x]} GPU {g}: expert {e} sits there {n} times")
                room = self.problem.capacity_LG[x, g]
                if self.used[x][g] > room:
                    over.append(f"layer {self.layer[x]} GPU {g}: {self.used[x][g]} replicas, room for {room}")
                elif self.used[x][g] < room and self.problem.fill != "none":
                    short_of.append(
                        f"layer {self.layer[x]} GPU {g}: {self.used[x][g]} of {room} slots are full, "
                        f"fill {str(self.problem.fill)!r} wants all"
                    )
            for e in range(self.E):
                n = self.replicas[x][e]
                if n < least:
                    short.append(f"layer {self.layer[x]}: expert {e} has {n} replicas, needs {least}")
                total = np.sum([part.get(e, 0.0) for part in self.share[x]])
                if abs(total - 1) > SLACK:
                    off.append(f"layer {self.layer[x]}: the shares of expert {e} sum to {total:.9g}, not 1")
        said = twice[:LISTED] + short[:LISTED] + over[:LISTED] + short_of[:LISTED]
        flat = [part for x in range(self.L) for row in self.plan.share_LGC[x].tolist() for part in row]
        if not all(-SLACK <= part < math.inf for part in flat):
            return [*said, "shares must be finite and at least 0"]
        if any(
            part != 0 and e < 0
            for x in range(self.L)
            for e, part in zip(self.plan.slots_LGC[x].ravel(), self.plan.share_LGC[x].ravel(), strict=True)
        ):
            said.append("an empty slot has a token share")
        said += off[:LISTED]
        return said + (self.uneven() if self.problem.split == "equal" else [])

    def uneven(self) -> list[str]:
        """An equal split: every slot 1/r; or, without fill, freed slots counted, if they are there."""
        cells = [(x, g, e) for x in range(self.L) for g in range(self.G) for e in sorted(self.count[x][g])]
        off = {
            (x, g, e): abs(self.share[x][g][e] - self.count[x][g][e] / self.replicas[x][e])
            for x, g, e in cells
        }
        uneven = sorted({(x, e) for (x, g, e), by in off.items() if by > SLACK})
        if not uneven or (self.problem.fill == "none" and self.over_slots(uneven)):
            return []
        x, g, e = max(off, key=lambda cell: off[cell])
        even = self.count[x][g][e] / self.replicas[x][e]
        return [
            f"layer {self.layer[x]} GPU {g}: expert {e} has share {self.share[x][g][e]:.6g}, "
            f"an equal split gives {even:.6g}"
        ]

    def over_slots(self, uneven: list[tuple[int, int]]) -> bool:
        taken = {
            (x, g): Counter({e: 1 for e, part in self.share[x][g].items() if part > 0})
            for x in range(self.L)
            for g in range(self.G)
        }
        for x, e in uneven:
            parts = {g: self.share[x][g][e] for g in range(self.G) if self.share[x][g].get(e, 0) != 0}
            if len(parts) < self.replicas[x][e]:
                return False
            for n in range(self.replicas[x][e], int(self.problem.capacity_LG[x].sum()) + 1):
                if all(abs(n * part - round(n * part)) < 1e-9 for part in parts.values()):
                    break
            else:
                return False
            for g, part in parts.items():
                taken[x, g][e] = round(n * part)
        return all(sum(held.values()) <= self.problem.capacity_LG[x, g] for (x, g), held in taken.items())

    def memory(self) -> list[str]:
        memory, size = self.problem.topology.memory_G, self.problem.bytes_L.tolist()
        if memory is None:
            return []
        need = [sum(size[x] * self.used[x][g] for x in range(self.L)) for g in range(self.G)]
        return [
            f"GPU {g}: {need[g]} bytes of experts, room for {memory[g]}"
            for g in range(self.G)
            if need[g] > memory[g]
        ]

    def limits(self) -> list[str]:
        limits, said = self.problem.limits, []
        most = max(max(row) for row in self.replicas)
        by_layer = [sum(row) for row in self.replicas]
        size = sum(n * b for n, b in zip(by_layer, self.problem.bytes_L.tolist(), strict=True))
        for what, value, cap in (
            (f"an expert has {most} replicas", most, limits.max_replicas),
            (f"a layer has {max(by_layer)} replicas", max(by_layer), limits.max_layer_replicas),
            (f"{sum(by_layer)} replicas in all", sum(by_layer), limits.max_total_replicas),
            (f"{size} bytes in all", size, limits.max_total_bytes),
        ):
            if cap is not None and value > cap:
                said.append(f"{what}, at most {cap} are allowed")
        domain, narrow = self.problem.topology.failure_domain_G, []
        wanted_LE = wanted_domains(self.problem)
        for x in range(self.L):
            for e in range(self.E):
                reach = len({domain[g] for g in range(self.G) if self.count[x][g][e]})
                if reach < wanted_LE[x, e] and wanted_LE[x, e] > 1:
                    narrow.append(
                        f"layer {self.layer[x]}: expert {e} is in {reach} failure domains, "
                        f"must be in {limits.spread}"
                    )
        said += narrow[:LISTED]
        for pairs, want, text in (
            (limits.pinned, True, "pinned to GPU {} and is not there"),
            (limits.forbidden, False, "forbidden on GPU {} and is there"),
        ):
            said += [
                f"layer {number}: expert {e} is {text.format(g)}"
                for layer, e, g in pairs
                for x, number in enumerate(self.layer)
                if layer in (-1, number) and (self.count[x][g][e] > 0) != want
            ]
        return said

    def moves(self) -> list[str]:
        size, claimed, said = self.problem.bytes_L.tolist(), self.plan.moves, []
        by_layer = [sum(len(fresh) for fresh in self.new[x]) for x in range(self.L)]
        moved, weight = sum(by_layer), sum(n * b for n, b in zip(by_layer, size, strict=True))
        held = sum(map(sum, self.used))
        if (claimed.count, claimed.bytes) != (moved, weight):
            said.append(
                f"plan claims {claimed.count} moves of {claimed.bytes} bytes, it makes {moved} of {weight}"
            )
        elif claimed.count_L.tolist() != by_layer:
            said.append("the plan's moves by layer are not those that it makes")
        live = self.problem.current is not None
        if claimed.cold == live:
            said.append(f"plan claims cold={claimed.cold}, the problem says the opposite")
        if abs(claimed.fraction - moved / max(held, 1)) > SLACK:
            said.append(
                f"plan claims to move {claimed.fraction:.6g} of its replicas, it moves {moved} of {held}"
            )
        limits, links = self.problem.limits, self.problem.topology.links
        if not live:
            return said
        if limits.max_moves is not None and moved > limits.max_moves:
            said.append(f"{moved} replicas move, at most {limits.max_moves} may")
        if limits.max_move_bytes is not None and weight > limits.max_move_bytes:
            said.append(f"{weight} bytes move, at most {limits.max_move_bytes} may")
        if limits.max_layer_moves is not None and max(by_layer) > limits.max_layer_moves:
            said.append(f"{max(by_layer)} replicas move in one layer, at most {limits.max_layer_moves} may")
        if limits.max_move_seconds is not None:
            busiest = max(sum(size[x] * len(self.new[x][g]) for x in range(self.L)) for g in range(self.G))
            least = busiest / (links.intra_node + links.inter_node + links.host)
            if least > limits.max_move_seconds * (1 + SLACK):
                said.append(
                    f"moves take {least:.6g} s at least, at most {limits.max_move_seconds:.6g} s are allowed"
                )
        return said

    def claims(self) -> list[str]:
        model, speed, load = self.problem.time, self.problem.topology.speed_G.tolist(), self.problem.load_LE
        said: list[str] = []
        times, ratios = [], []
        for x in range(self.L):
            alive = (self.problem.capacity_LG[x] > 0).tolist()
            served = [[load[x, e] * part for e, part in self.share[x][g].items()] for g in range(self.G)]
            row = [
                slow_time(model, sum(tokens), sum(token > 0 for token in tokens), speed[g])
                if alive[g]
                else 0.0
                for g, tokens in enumerate(served)
            ]
            of_all = sum(s for s, lives in zip(speed, alive, strict=True) if lives)
            work = sum(t * s for t, s in zip(row, speed, strict=True)) / (of_all or 1.0)
            times.append(row)
            ratios.append(max(row) / work if work > 0 else 1.0)
        top = [max(row) for row in times]
        far = any(
            abs(a - b) > SLACK * top[x]
            for x, row in enumerate(times[: len(self.plan.time_LG)])
            for a, b in zip(self.plan.time_LG[x], row, strict=True)
        )
        if len(self.plan.time_LG) != self.L or far:
            said.append("the plan's GPU times are not those of its shares")
        given = self.plan.imbalance_L.tolist()
        if len(given) != self.L or any(abs(a - b) > SLACK for a, b in zip(given, ratios, strict=True)):
            said.append("the plan's imbalance is not that of its shares")
        proof = self.plan.certificate
        if len(proof.lower_bound_L) != self.L or len(proof.value_L) != self.L:
            return [*said, "the certificate does not cover every layer"]
        if any(abs(a - b) > SLACK * b for a, b in zip(proof.value_L, top, strict=True)):
            said.append("the certificate's values are not the plan's largest GPU times")
        for x, (low, value) in enumerate(zip(proof.lower_bound_L, proof.value_L, strict=True)):
            if low > value * (1 + SLACK):
                name = proof.bound_L[x] if x < len(proof.bound_L) else "unnamed"
                said.append(
                    f"layer {self.layer[x]}: lower bound {low:.9g} ({name}) "
                    f"is above the plan's own {value:.9g}"
                )
                break
        return said


def random_limits(rng: Any, plan: Plan, problem: Problem) -> Limits:
    """Limits at, just above or just below what the plan has of each thing, some of them only."""
    L, G, E = problem.layers, problem.topology.gpus, problem.experts
    replicas = plan.replicas_LE
    size = problem.bytes_L
    links = problem.topology.links
    fresh = np.zeros(G)
    if problem.current is not None:
        for x, g in np.ndindex(L, G):
            held = [e for e in plan.slots_LGC[x, g] if e >= 0]
            fresh[g] += size[x] * sum(e not in problem.current.slots_LGC[x, g] for e in set(held))
    least = fresh.max() / (links.intra_node + links.inter_node + links.host)

    def near(value: float, low: int) -> Any:
        return max(int(value) + int(rng.integers(-1, 2)), low) if rng.random() < 0.4 else None

    def pairs(*without: tuple[int, int, int]) -> tuple[tuple[int, int, int], ...]:
        rows = [-1, *problem.loads.layers]
        drawn = [
            (int(rng.choice(rows)), int(rng.integers(E)), int(rng.integers(G)))
            for _ in range(rng.integers(0, 3))
        ]
        return tuple(pair for pair in drawn if pair not in without)

    wanted = {
        "min_replicas": int(rng.choice([1, 1, 1, 2])),
        "max_replicas": near(replicas.max(), 1),
        "max_layer_replicas": near(replicas.sum(1).max(), 1),
        "max_total_replicas": near(replicas.sum(), 1),
        "max_total_bytes": near(replicas.sum(1) @ size, 1),
        "max_moves": near(plan.moves.count, 0),
        "max_move_bytes": near(plan.moves.bytes, 0),
        "max_layer_moves": near(plan.moves.count_L.max(), 0),
        "max_move_seconds": float(least * rng.choice([0.9, 1 - 3e-6, 1 - 3e-7, 1.0, 1.1]))
        if rng.random() < 0.5 and least > 0
        else None,
        "spread": int(rng.choice([1, 1, 2, 3])),
        "spread_experts": (None, 1, 2, ((-1, 0),))[int(replicas.sum()) % 4],
        "pinned": pairs(),
    }
    wanted["forbidden"] = pairs(*wanted["pinned"])
    if wanted["max_replicas"] is not None:
        wanted["max_replicas"] = max(wanted["max_replicas"], wanted["min_replicas"])
    return Limits(**wanted)


def random_case(rng: Any) -> tuple[Problem, Plan]:
    """A problem and a plan with true figures."""
    G, L = int(rng.integers(1, 6)), int(rng.integers(1, 4))
    slots_G = rng.integers(1, 4, G)
    E = int(rng.integers(1, min(int(slots_G.sum()), 7) + 1))
    slots_G = np.maximum(np.minimum(slots_G, E), 1)
    E = min(E, int(slots_G.sum()))
    first = int(rng.integers(0, 3))
    load = rng.lognormal(0, 1.5, (1, L, E)) * rng.choice([1e-6, 1.0, 1e6]) * (rng.random((1, L, E)) < 0.8)
    load[0, 0, 0] += not load.any()
    node_G = np.sort(rng.integers(0, 2, G))
    size_L = rng.integers(1, 9, L)
    memory = np.full(G, int(slots_G.max() * size_L.sum())) if rng.random() < 0.4 else None
    time = [
        TimeModel(),
        TimeModel(token_cost=0.5, activation_cost=3.0, launch=float(rng.choice([0.0, 2.0]))),
        TimeModel(token_cost=2.0),
        TimeModel(
            curve_tokens=[0.0, 2.0, 9.0],
            curve_activated=[0.0, 1.0, 3.0],
            curve_time=[[1.0, 2.0, 3.0], [2.0, 3.0, 5.0], [3.0, 6.0, 9.0]],
            unit="s",
        ),
    ][rng.choice(4, p=[0.5, 0.2, 0.1, 0.2])]
    problem = Problem(
        loads=Loads(load_TLE=load, layers=tuple(range(first, first + L))),
        topology=Topology(
            node_G=node_G - node_G.min(),
            speed_G=np.ones(G) if rng.random() < 0.5 else rng.choice([0.5, 1.0, 2.0], G),
            slots_G=slots_G,
            memory_G=memory,
            domain_G=None if rng.random() < 0.5 else rng.integers(0, 3, G),
            links=Links(intra_node=8.0, inter_node=4.0, host=2.0),
        ),
        split=str(rng.choice(["fractional", "equal"])),
        expert_bytes_L=size_L if memory is not None or rng.random() < 0.7 else None,
        time=time,
    )
    capacity = problem.capacity_LG
    if rng.random() < 0.6:
        before = random_slots(rng, capacity, E)
        problem = problem.replace(current=Placement(slots_LGC=before, experts=E))
    slots = random_slots(rng, capacity, E)
    if problem.current is not None and rng.random() < 0.4:
        slots = problem.current.slots_LGC[:, :, ::-1].copy()
    share = random_shares(rng, slots, E) if problem.split == "fractional" else None
    if share is None and rng.random() < 0.4:
        share = slot_shares(rng, slots, E)
    if rng.random() < 0.4:
        before = problem.current
        if before is not None and rng.random() < 0.5:
            before = before.replace(slots_LGC=full_slots(rng, before.slots_LGC, problem))
        problem = problem.replace(fill=str(rng.choice(["distinct", "copies"])), current=before)
        slots = full_slots(rng, slots, problem)
        share = random_shares(rng, slots, E) if share is not None and problem.split == "fractional" else None
    plan = plan_of(problem, slots, share)
    if memory is not None and problem.current is None:
        need = size_L @ (slots >= 0).sum(2)
        tight = problem.topology.replace(memory_G=np.maximum(need + rng.integers(-1, 2, G), 1))
        problem = problem.replace(topology=tight)
    if rng.random() < 0.6:
        problem = problem.replace(limits=random_limits(rng, plan, problem))
    return problem, plan


def slot_shares(rng: Any, slots: Any, experts: int) -> Any:
    """Shares of whole slots, some of them counted twice or not at all."""
    share = np.zeros(slots.shape)
    for x in range(len(slots)):
        for e in range(experts):
            at = np.argwhere(slots[x] == e)
            weight = rng.choice([1, 1, 1, 2, 0], len(at)).astype(float)
            weight = weight if weight.sum() else np.ones(len(at))
            for (g, c), part in zip(at, weight / weight.sum(), strict=True):
                share[x, g, c] = part
    return share


def broken(rng: Any, problem: Problem, plan: Plan) -> Plan:
    """The plan with something changed: a slot, a share, or a claim, by a little or by much."""

    def nudged(array: Any, scale: float = 1.0) -> Any:
        copy = np.array(array, dtype=np.float64)
        at = tuple(int(rng.integers(n)) for n in copy.shape)
        top = np.abs(copy[at[0]]).max() if copy.ndim > 1 else abs(copy[at])
        copy[at] += scale * (top or 1.0) * rng.choice([5e-7, -5e-7, 3e-6, -3e-6, 1.0, -1.0])
        return copy

    kind = int(rng.integers(12))
    proof, moves = plan.certificate, plan.moves
    if kind < 3:
        slots = plan.slots_LGC.copy()
        for _ in range(rng.integers(1, 4)):
            at = tuple(int(rng.integers(n)) for n in slots.shape)
            slots[at] = rng.integers(-1 - (rng.random() < 0.1), problem.experts + (rng.random() < 0.1))
        if slots.min() < -1 or slots.max() >= problem.experts or rng.random() < 0.3:
            return plan.replace(slots_LGC=slots)
        share = np.where(slots >= 0, plan.share_LGC, 0.0)
        return plan_of(problem, slots, share)
    if kind < 6:
        share = nudged(plan.share_LGC)
        if rng.random() < 0.1:
            share.flat[int(rng.integers(share.size))] = rng.choice([np.nan, np.inf, -1e-7, -1.0])
        return plan.replace(share_LGC=share) if rng.random() < 0.5 else plan_of_any(problem, plan, share)
    if kind == 6:
        return plan.replace(time_LG=nudged(plan.time_LG))
    if kind == 7:
        return plan.replace(imbalance_L=nudged(plan.imbalance_L, 1 / plan.imbalance_L.max()))
    if kind == 8:
        one = np.arange(problem.layers) == rng.integers(problem.layers)
        one = one.astype(np.int64)
        return plan.replace(
            moves=[
                moves.replace(count=moves.count + 1),
                moves.replace(bytes=moves.bytes + 1),
                moves.replace(count_L=moves.count_L + one - np.roll(one, 1)),
                moves.replace(cold=not moves.cold),
                moves.replace(fraction=moves.fraction + float(rng.choice([5e-7, -5e-7, 3e-6, -3e-6]))),
            ][rng.integers(5)]
        )
    if kind == 9:
        return plan.replace(certificate=proof.replace(value_L=nudged(proof.value_L)))
    if kind == 10:
        bound = proof.value_L * rng.choice([1 - 3e-6, 1.0, 1 + 5e-7, 1 + 3e-6, 2.0], problem.layers)
        names = ("mean",) * int(rng.integers(0, problem.layers + 1))
        return plan.replace(certificate=proof.replace(lower_bound_L=bound, bound_L=names))
    return plan.replace(split="equal" if plan.split == "fractional" else "fractional")


def plan_of_any(problem: Problem, plan: Plan, share: Any) -> Plan:
    """True figures for shares of any kind, where there are some."""
    if not np.isfinite(share).all():
        return plan.replace(share_LGC=share)
    return plan_of(problem, plan.slots_LGC, share)


def test_the_same_words_as_rule_by_rule() -> None:
    """Sound plans and broken ones, under limits that just hold or just do not."""
    rng = np.random.default_rng(1)
    kinds: Counter[str] = Counter()
    for _ in range(900):
        problem, plan = random_case(rng)
        if rng.random() < 0.75:
            plan = broken(rng, problem, plan)
        said = violations(problem, plan)
        outside = plan.slots_LGC.min() < -1 or plan.slots_LGC.max() >= problem.experts
        if outside:
            assert said == [f"slots hold an expert outside -1..{problem.experts - 1}"]
            continue
        wanted = Judge(problem, plan).found()
        assert said == wanted, (problem.limits, plan.slots_LGC, plan.share_LGC)
        kinds.update([" ".join(word for word in text.split() if word.isalpha()) for text in said] or ["none"])
    assert len(kinds) > 25, kinds  # every rule was broken now and then
    assert kinds["none"] > 100


def words_of(slots: Any, experts: int, room: Any) -> list[str]:
    """What is said of a layer of slots."""
    try:
        check_slots(slots, experts, room)
    except InvalidPlanError as error:
        return error.violations
    return []


def test_any_layer_of_slots_is_judged() -> None:
    rng = np.random.default_rng(3)
    for _ in range(600):
        G, C, E = (int(n) for n in rng.integers(1, 4, 3))
        room = rng.integers(0, C + 1, G)
        slots = rng.integers(-1, E, (G, C)).astype(np.int32)
        if rng.random() < 0.1:
            slots.flat[0] = rng.choice([-2, E])
        rows = [[e for e in row if e >= 0] for row in slots.tolist()]
        held = {e for row in rows for e in row}
        wanted = []
        if any(len(set(row)) < len(row) for row in rows):
            wanted.append("an expert sits on a GPU twice")
        if len(held) < E:
            wanted.append(f"expert {min(set(range(E)) - held)} has no replica")
        over = [gpu for gpu, row in enumerate(rows) if len(row) > room[gpu]]
        if over:
            fits = f"{len(rows[over[0]])}, it has room for {room[over[0]]}"
            wanted.append(f"GPU {over[0]} holds more replicas than fit: {fits}")
        if slots.min() < -1 or slots.max() >= E:
            wanted = [f"slots hold an expert outside -1..{E - 1}"]
        assert words_of(slots, E, room) == wanted
    with pytest.raises(InvalidPlanError, match="outside"):
        check_slots(np.zeros((2, 0), np.int32), 1, np.ones(2, np.int64))
