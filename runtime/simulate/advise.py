"""What to configure: width and redundant experts against the KV cache, split, interval, keep-alive.

A deployment of N GPUs serves as N / W groups, each with the whole model over W GPUs. A narrow group holds
more experts on each GPU and leaves less for the KV cache, so that fewer requests are in flight; a redundant
expert levels the GPUs and takes cache. What both come to is worked out in the simulator's times (`Machine`):
a cycle in which every request in flight reads its prompt once and writes its answer, token by token, in the
passes of the simulator's closed loop.

Placements are planned on loads of one time and judged on those of another (the next scenario of a recording,
the next stretch of generated traffic), so that what drift takes away is not counted as gained. Live shares
are searched for by times that are learnt, and cost what they cost, as in the simulator.

All settings are looked at in a few layers, those that come near the best in all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moeless_opt.api import plan
from moeless_opt.problems.arrays import FloatArray, IntArray, SlotArray
from moeless_opt.problems.errors import InfeasibleError, ProblemError
from moeless_opt.problems.plan import count_moves
from moeless_opt.problems.spec import ModelSpec, Topology, contiguous
from moeless_opt.runtime.simulate.beliefs import Beliefs
from moeless_opt.runtime.simulate.hardware import slots_of
from moeless_opt.runtime.simulate.machine import Machine
from moeless_opt.runtime.simulate.memory import Room
from moeless_opt.runtime.simulate.settings import Settings
from moeless_opt.runtime.simulate.shares import Placed, PlannedRule, ShareRule, SplitCost, TimedRule
from moeless_opt.runtime.simulate.traffic import RoutingModel

__all__ = ["READS", "SPARE", "Advice", "Deployment", "Offered", "advise", "group_topology", "widths"]

LAYERS = 8
"""Layers in which every setting is looked at: from the flattest to the most skewed, at even steps."""

NEAR = 0.1
"""What is no further behind the best in those is looked at in all layers."""

DRAWS = 24
"""Passes that are drawn for each size of a batch, over all stretches of time."""

SETTLED = 16
"""Passes before those that count, where shares are live: after them it is known where they pay."""

READS = 8192
"""Most tokens of a pass, for each GPU: what engines read at once."""

SPARE = (0, 1, 2, 3, 4, 6, 8)
"""Slots of a GPU and layer beyond one copy of each expert that are looked at."""

CLOSE = 0.01
"""What two settings may differ by to be alike: then the one that takes less memory is advised."""

PAYS = 0.01
"""Share of a pass that balancing must save to pay."""

DECIDE = 1.0
"""Seconds between plans at the soonest: what engines measure their loads over."""

TOLERANCES = (0.01, 0.03, 0.1)
"""Tolerances of plans from what is live that are looked at beside plans made anew."""

SPLITS = ("static", "equal", "fractional", "live")
"""How replicas share tokens, the simplest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offered:
    """What is served.

    Parameters
    ----------
    share_TLE : array, shape [T, L, E]
        Shares of the experts in consecutive stretches of time, summing to 1 in each layer.
    prompt, answer : float
        Tokens of a request, mean.
    reserved, held : float
        Of a request in flight, mean over time: tokens of the KV cache that are kept for it, and that it has
        filled. Long answers are in flight for long.
    rate : float or None
        Requests per second; None: as many as there is room for.
    most_requests : int
        In flight on a GPU.
    concentration : float
        How much requests of a stretch are alike (see `RoutingModel`).
    source : str
        Where the loads come from.
    """

    share_TLE: FloatArray
    prompt: float
    answer: float
    reserved: float
    held: float
    rate: float | None
    most_requests: int
    concentration: float
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """One setting, and what it comes to.

    Parameters
    ----------
    width, nodes, groups : int
        GPUs of a group, nodes that they are on, and groups.
    slots, redundant : int
        Replicas of a GPU and layer; redundant experts of a layer (0: one copy of each).
    split : str
        ``static`` (no balancing), ``equal`` (EPLB), ``fractional`` or ``live``: how replicas share tokens.
    expert_bytes : float
        Of one GPU.
    cache_tokens, requests : float
        Of a group: tokens in the KV cache; requests in flight that it has room for.
    batch : float
        Requests in flight of a group at the rate that was asked for; else `requests`.
    token_s, first_s : float
        Seconds for a token of an answer, reading the prompts of others included, and for reading a prompt.
    capacity : float
        Tokens of answers per second that all GPUs together can write.
    imbalance : float
        Largest over mean GPU tokens of writing passes at that batch.
    tolerance : float or None
        Balance that plans give up for fewer moves: made from what is live, every slot full; None: made anew.
    moved : float
        Share of all replicas that a plan moves, mean.
    interval : float
        Seconds between two plans, so that what they move takes at most a twentieth of the links' time.
    layers : int
        Layers that were looked at.
    """

    width: int
    nodes: int
    groups: int
    slots: int
    redundant: int
    split: str
    expert_bytes: float
    cache_tokens: float
    requests: float
    batch: float
    token_s: float
    first_s: float
    capacity: float
    imbalance: float
    tolerance: float | None
    moved: float
    interval: float
    layers: int

    @property
    def gpu_hours(self) -> float:
        """GPU hours for a million tokens of answers at capacity."""
        return self.width * self.groups / 3600 * 1e6 / self.capacity

    @property
    def every(self) -> int:
        """Passes between two plans."""
        return max(int(self.interval / self.token_s), 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """What to configure, and why.

    Parameters
    ----------
    settings : tuple of Deployment
        All that fit.
    choices : tuple of Deployment
        The best of each width and number of slots, the best first.
    best, static : Deployment
        What is advised, and the best that never balances.
    replans : tuple of Deployment
        The advised width, slots and split with plans that move less and less; empty where engines plan.
    engine : Deployment
        The best of what engines do by themselves: no balancing, or EPLB with an equal split.
    rate : float or None
        Requests per second that were asked for.
    served : float
        Requests per second that the advised setting can serve.
    writing : float or None
        Requests in flight from which on balancing saves 1 % of a pass that writes; None where it never does.
    reading : float or None
        Tokens of prompts from which on it saves 1 % of a pass that reads.
    keep_alive : float
        Seconds that unused replicas stay.
    reasons : tuple of str
        For people.
    """

    model: ModelSpec
    settings: tuple[Deployment, ...]
    choices: tuple[Deployment, ...]
    best: Deployment
    static: Deployment
    replans: tuple[Deployment, ...]
    engine: Deployment
    rate: float | None
    served: float
    writing: float | None
    reading: float | None
    keep_alive: float
    reasons: tuple[str, ...]


class _Passes:
    """Loads of passes in some layers, drawn as the simulator's closed loop draws them."""

    def __init__(self, traffic: Offered, model: ModelSpec, layers_L: IntArray) -> None:
        self.layers, self.top_k = len(layers_L), model.top_k
        self.share_TLE = traffic.share_TLE[:, layers_L]
        self.concentration = traffic.concentration
        self.routing = RoutingModel(
            popularity_DLE=np.maximum(self.share_TLE, 1e-9), concentration=1.0, top_k=model.top_k
        )
        self.stretches = len(self.share_TLE) - 1

    def drawn(
        self, readers: float, prompt: float, writers: float, *, settle: bool
    ) -> Iterator[tuple[int, FloatArray, int]]:
        """Stretch of time whose plan serves, loads [B, L, E], and how many of them come before what counts.

        Parameters
        ----------
        readers, prompt : float
            Requests that read, and tokens of each.
        writers : float
            Requests that write a token.
        settle : bool
            Whether there are any that do not count.
        """
        rng = np.random.default_rng(0)
        tokens = readers * prompt + writers
        # A mix of requests has the moments of one that is more concentrated.
        square = (readers * prompt**2 + writers) / tokens**2
        alike = max((self.concentration + 1) / square - 1, 0.1)
        routing = self.routing.replace(concentration=min(alike, 1e9))
        pairs = max(round(tokens), 1) * self.top_k
        for stretch in range(self.stretches):
            before = SETTLED if settle and stretch == 0 else 0
            count = before + -(-DRAWS // self.stretches)
            share_BLE = routing.distributions(np.full(count, stretch + 1), rng).astype(np.float64)
            share_BLE /= share_BLE.sum(2, keepdims=True)
            yield stretch, rng.multinomial(pairs, share_BLE).astype(np.float64), before


class _Group:
    """A group of GPUs with so many slots, and what its layers take."""

    def __init__(
        self,
        machine: Machine,
        traffic: Offered,
        spare: int,
        memory: float | None,
        layers_L: IntArray,
        tolerance: float | None = None,
    ) -> None:
        model, gpus = machine.model, machine.topology.gpus
        self.spare, self.traffic, self.layers_L, self.tolerance = spare, traffic, layers_L, tolerance
        self.slots = -(-model.experts // gpus) + spare
        self.topology = slots_of(machine.topology, self.slots)
        self.machine = machine.replace(topology=self.topology)
        self.room = Room.of(self.machine, memory)
        self.passes = _Passes(traffic, model, layers_L)
        self.split_s = Settings().split_seconds(model.experts, gpus)
        self.beliefs = Beliefs(
            self.machine,
            self.machine.believed(Settings().believed),
            learns=True,
            slots=min(self.slots + 1, model.experts),
        )
        self._seen = set[int]()
        self._planned: dict[tuple[int, str], tuple[SlotArray, FloatArray | None]] = {}

    def on(self, layers_L: IntArray, tolerance: float | None = None) -> _Group:
        """The same, looked at in other layers, or planned from what is live."""
        memory = self.room.memory / 1e9
        return _Group(self.machine, self.traffic, self.spare, memory, layers_L, tolerance)

    @property
    def redundant(self) -> int:
        """Copies of a layer beyond one of each expert, every slot full."""
        return self.slots * self.topology.gpus - self.machine.model.experts if self.spare else 0

    @cached_property
    def static_LGC(self) -> SlotArray:
        """One copy of each expert, in blocks."""
        size_LG = np.full((self.passes.layers, self.topology.gpus), self.slots)
        return contiguous(self.machine.model.experts, size_LG)

    def placed(self, stretch: int, split: str) -> tuple[SlotArray, FloatArray | None]:
        """Slots and shares that are planned on a stretch of time."""
        if split == "static":
            return self.static_LGC, None
        key = (stretch, "equal" if split == "equal" else "fractional")
        if key not in self._planned:
            self._planned[key] = self._plan(stretch, key[1])
        return self._planned[key]

    def _plan(self, stretch: int, split: str) -> tuple[SlotArray, FloatArray]:
        load_LE, model = self.passes.share_TLE[stretch] * 1e6, self.machine.model
        if split == "equal":  # as engines do it by themselves
            made = plan(load_LE, self.topology, model=model, solver="eplb", split="equal")
        elif self.tolerance is None:
            made = plan(load_LE, self.topology)
        else:
            live_LGC = self.placed(stretch - 1, split)[0] if stretch else self.static_LGC
            made = plan(
                load_LE,
                self.topology,
                current=live_LGC,
                fill="distinct",
                balance_tolerance=self.tolerance,
            )
        return np.asarray(made.slots_LGC), np.asarray(made.share_LGC)

    def _batch(self, rate: float, most: float, capacity: float, split: str) -> float:
        """Requests in flight where so many come per second: between 1 and what is served at most."""
        low, high = 1.0, most
        slow, quick = self.cycle(low, split)[0], capacity
        for _ in range(4):
            if slow >= rate:
                return low
            if high / low < 1.02 or quick <= slow:
                break
            # Straight in logarithms, a little above: what keeps up is wanted.
            part = np.log(rate / slow) / np.log(quick / slow)
            middle = float(low * (high / low) ** min(0.05 + 0.95 * part, 1.0))
            served = self.cycle(middle, split)[0]
            if served >= rate:
                high, quick = middle, served
            else:
                low, slow = middle, served
        return high

    def moved(self, split: str) -> float:
        """Share of the replicas that a plan moves, mean; of the first, where there is only one."""
        if split == "static":
            return 0.0
        made = [self.placed(stretch, split)[0] for stretch in range(self.passes.stretches)]
        if len(made) == 1:
            made.insert(0, self.static_LGC)
        experts, bytes_L = self.machine.model.experts, np.ones(self.passes.layers, dtype=np.int64)
        pairs = zip(made[1:], made[:-1], strict=True)
        return float(np.mean([count_moves(new, old, experts, bytes_L).fraction for new, old in pairs]))

    def layer(self, readers: float, prompt: float, writers: float, split: str) -> tuple[float, float]:
        """Mean seconds of a layer in such a pass, and imbalance, on loads that were not planned on."""
        live = split == "live"
        rule: ShareRule = TimedRule() if live else PlannedRule()
        cost = SplitCost(self.split_s, self.passes.layers) if live else None
        seconds, most, mean = [], 0.0, 0.0
        for stretch, load_BLE, before in self.passes.drawn(readers, prompt, writers, settle=live):
            slots_LGC, share_LGC = self.placed(stretch, split)
            placed = Placed(
                self.machine,
                self.beliefs.table,
                slots_LGC,
                share_LGC,
                believed=self.beliefs.machine,
                split=cost,
            )
            if before:  # until it is known what GPUs take, and where live shares pay
                times, _ = rule.times(load_BLE[:before], placed)
                size = round(np.log2(readers * prompt + writers))
                if size not in self._seen:
                    self._seen.add(size)
                    self.beliefs.see(times)
                placed.table, placed.believed = self.beliefs.table, self.beliefs.machine
            times, _ = rule.times(load_BLE[before:], placed)
            seconds.append(float(times.layer_BL.mean()))
            most += float(times.tokens_BLG.max(2).sum())
            mean += float(times.tokens_BLG.mean(2).sum())
        return float(np.mean(seconds)), most / max(mean, 1e-30)

    def pass_seconds(self, readers: float, prompt: float, writers: float, split: str) -> float:
        """Of a whole pass in which so many requests read prompts and others write a token."""
        tokens, cached = readers * prompt + writers, readers * prompt + writers * self.traffic.held
        rest = float(self.machine.rest(np.array([tokens]), np.array([cached]))[0])
        return self.machine.model.layers * self.layer(readers, prompt, writers, split)[0] + rest

    def cycle(self, batch: float, split: str) -> tuple[float, float]:
        """Requests per second of so many in flight, and seconds of a pass that reads prompts.

        Answers end one by one, and as many prompts are read as answers ended: in every pass some, or one in
        some passes. What a pass may read limits how many are in flight.
        """
        prompt, answer = self.traffic.prompt, self.traffic.answer
        room = READS * self.topology.gpus
        batch = min(batch, answer * max(1.0, room / (prompt + answer - 1)))
        readers = max(batch / answer, 1.0)
        reading = batch / readers / answer  # share of the passes
        read_s = self.pass_seconds(readers, prompt, max(batch - readers, 0.0), split)
        write_s = self.pass_seconds(0.0, prompt, batch, split) if reading < 1 else 0.0
        return batch / (answer * (reading * read_s + (1 - reading) * write_s)), read_s

    def choice(self, groups: int, split: str) -> Deployment:
        """What the setting comes to."""
        traffic, gpus = self.traffic, self.topology.gpus
        cache = self.room.tokens(self.topology)
        requests = float(max(min(cache // traffic.reserved, traffic.most_requests * gpus), 1))
        capacity, first_s = self.cycle(requests, split)
        batch, rate = requests, capacity
        if traffic.rate is not None and traffic.rate / groups < capacity:
            batch = self._batch(traffic.rate / groups, requests, capacity, split)
            rate, first_s = self.cycle(batch, split)
        moved = self.moved(split)
        return Deployment(
            width=gpus,
            nodes=self.topology.nodes,
            groups=groups,
            slots=self.slots,
            redundant=self.redundant,
            split=split,
            expert_bytes=float(self.room.experts_G(self.topology).max()),
            cache_tokens=cache,
            requests=requests,
            batch=batch,
            token_s=batch / rate / traffic.answer,
            first_s=first_s,
            capacity=groups * capacity * traffic.answer,
            imbalance=self.layer(0.0, traffic.prompt, batch, split)[1],
            tolerance=self.tolerance,
            moved=moved,
            interval=self.interval(moved),
            layers=self.passes.layers,
        )

    def interval(self, moved: float) -> float:
        """Seconds between two plans, at least, that move such a share of all slots."""
        links, model = self.topology.links, self.machine.model
        slowest = links.inter_node if self.topology.nodes > 1 else links.intra_node
        return max(DECIDE, 20 * moved * self.slots * model.layers * model.expert_bytes / slowest)


_Found = list[tuple[Deployment, _Group]]


def widths(topology: Topology, experts: int) -> list[int]:
    """GPUs that a group may have: equal parts of every node, whole nodes, or all."""
    size_N = np.bincount(topology.node_G)
    common = int(np.gcd.reduce(size_N))
    found = {width for width in range(1, common + 1) if common % width == 0}
    if (size_N == common).all():
        found |= {common * many for many in range(2, len(size_N)) if len(size_N) % many == 0}
    found.add(topology.gpus)
    return sorted(width for width in found if width <= experts)


def group_topology(topology: Topology, width: int) -> Topology:
    """The first GPUs of a machine."""
    return topology.replace(
        node_G=topology.node_G[:width],
        speed_G=topology.speed_G[:width],
        slots_G=np.ones(width, dtype=np.int64),
        memory_G=None,
        domain_G=None,
    )


def _looked_at(share_TLE: FloatArray, most: int) -> IntArray:
    """Layers from the flattest to the most skewed, at even steps, in their own order."""
    layers = share_TLE.shape[1]
    if layers <= most:
        return np.arange(layers)
    by_skew = np.argsort((share_TLE**2).sum(2).mean(0), kind="stable")
    return np.asarray(np.sort(by_skew[((np.arange(most) + 0.5) * layers / most).astype(np.int64)]))


def advise(
    machine: Machine, traffic: Offered, *, memory: float | None = None, most_slots: int | None = None
) -> Advice:
    """Compare all settings that fit.

    Parameters
    ----------
    machine : Machine
        Model and GPUs, all of them; slots are what is asked for.
    traffic : Offered
        What is served.
    memory : float, optional
        GB of each GPU for weights and the KV cache.
    most_slots : int, optional
        Replicas of a GPU and layer at most.

    Raises
    ------
    InfeasibleError
        If nothing fits.
    ProblemError
        If GPUs are not all alike.
    """
    if (machine.topology.speed_G != machine.topology.speed_G[0]).any():
        raise ProblemError("topology", "has GPUs of different speeds; advice is for groups of equal ones")
    topology, model = machine.topology, machine.model
    few_L, all_L = _looked_at(traffic.share_TLE, LAYERS), np.arange(model.layers)
    found: _Found = []
    for width in widths(topology, model.experts):
        part = machine.replace(topology=group_topology(topology, width))
        for spare in SPARE:
            group = _Group(part, traffic, spare, memory, few_L)
            if group.room.tokens(group.topology) < traffic.reserved:
                break
            if group.slots > (model.experts if most_slots is None else min(model.experts, most_slots)):
                break
            ways = SPLITS[:1] if spare == 0 or width == 1 else SPLITS[1:]
            found += [(group.choice(topology.gpus // width, split), group) for split in ways]
    if not found:
        room = Room.of(machine, memory)
        most = max(widths(topology, model.experts))
        least = model.layers * -(-model.experts // most) * model.expert_bytes
        raise InfeasibleError(
            f"memory: {model.name} fits on no group of up to {most} {machine.gpu}s: one copy of its experts "
            f"takes {least / 1e9:.1f} GB, its other weights {room.others / 1e9:.1f} GB and the cache of one "
            f"request {traffic.reserved * machine.kv_token_bytes / most / 1e9:.3g} GB of the "
            f"{room.memory / 1e9:.1f} GB of each"
            + ("" if most_slots is None else f", with at most {most_slots} slots")
        )
    if len(few_L) < model.layers:
        found = _closer(found, traffic, all_L)
    order = sorted(found, key=lambda each: _merit(each[0], traffic))
    best, group = _frugal(order, traffic)
    group = group.on(all_L)
    replans: _Found = []
    if best.split in ("fractional", "live"):
        groups = [group, *(group.on(all_L, tolerance) for tolerance in TOLERANCES)]
        replans = [(each.choice(best.groups, best.split), each) for each in groups]
        best, group = _steady(replans, traffic)
    return _advice(order, best, group, tuple(choice for choice, _ in replans), traffic)


def _closer(found: _Found, traffic: Offered, layers_L: IntArray) -> _Found:
    """What may be the best, the best static or the best of engines, looked at in all layers."""
    looked: dict[int, _Group] = {}
    closer = []
    near = set[int]()
    for splits in (SPLITS, ("static",), ("static", "equal")):
        kin = [
            (_merit(choice, traffic), at) for at, (choice, _) in enumerate(found) if choice.split in splits
        ]
        (kind, value), _ = min(kin)
        near |= {at for merit, at in kin if merit <= (kind, value + NEAR * abs(value))}
    for at, (choice, group) in enumerate(found):
        if at in near:
            whole = looked.setdefault(id(group), group.on(layers_L))
            closer.append((whole.choice(choice.groups, choice.split), whole))
        else:
            closer.append((choice, group))
    return closer


def _merit(choice: Deployment, traffic: Offered) -> tuple[float, float]:
    """Small is good: what keeps up first, by the time of an answer; else by tokens per second."""
    if traffic.rate is not None and choice.capacity >= traffic.rate * traffic.answer:
        return (0.0, choice.first_s + traffic.answer * choice.token_s)
    return (1.0, -choice.capacity)


def _near(found: _Found, traffic: Offered) -> _Found:
    """Those that are as good as the best."""
    kind, value = min(_merit(choice, traffic) for choice, _ in found)
    return [each for each in found if _merit(each[0], traffic) <= (kind, value + CLOSE * abs(value))]


def _frugal(found: _Found, traffic: Offered) -> tuple[Deployment, _Group]:
    """Of those that are as good as the best, the one that takes least memory, and balances least."""
    return min(_near(found, traffic), key=lambda each: (each[0].expert_bytes, SPLITS.index(each[0].split)))


def _steady(found: _Found, traffic: Offered) -> tuple[Deployment, _Group]:
    """Of those that are as good as the best, the one that moves least."""
    return min(_near(found, traffic), key=lambda each: each[0].moved)


def _advice(
    order: _Found,
    best: Deployment,
    group: _Group,
    replans: tuple[Deployment, ...],
    traffic: Offered,
) -> Advice:
    static = _frugal([each for each in order if each[0].split == "static"], traffic)[0]
    engine = _frugal([each for each in order if each[0].split in ("static", "equal")], traffic)[0]
    kept: dict[tuple[int, int], Deployment] = {}
    for choice, _ in order:
        kept.setdefault((choice.width, choice.slots), choice)
    kept[best.width, best.slots] = best
    writing, reading = _break_even(group, best)
    served = best.capacity / traffic.answer
    reasons = [
        f"groups of {best.width}: {best.expert_bytes / 1e9:.1f} GB of experts on each GPU leave room for "
        f"{best.cache_tokens:,.0f} tokens of KV cache; {best.requests:,.0f} requests in flight",
    ]
    if best.split != "static":
        reasons.append(
            f"against the best without balancing ({static.width} GPUs, {static.slots} slots): "
            f"{best.capacity / static.capacity - 1:+.1%} tokens/s, "
            f"{best.token_s / static.token_s - 1:+.1%} time per token, "
            f"{best.gpu_hours / static.gpu_hours - 1:+.1%} GPU hours"
        )
    if best.width > 1:
        reasons.append(
            f"balancing pays by 1 % in {_from(writing, 'write', 'for {} requests')} (here for "
            f"{best.batch:,.0f}), in {_from(reading, 'read', '{} tokens of prompts')}"
        )
    if traffic.rate is not None:
        reasons.append(
            f"{traffic.rate:g} requests/s asked for, {served:.3g} can be served"
            + ("" if served >= traffic.rate else f"; {traffic.rate / served:.1f} times as many GPUs would do")
        )
    return Advice(
        model=group.machine.model,
        settings=tuple(choice for choice, _ in order),
        choices=tuple(kept.values()),
        best=best,
        static=static,
        engine=engine,
        rate=traffic.rate,
        served=served,
        writing=writing,
        reading=reading,
        replans=replans,
        keep_alive=2 * best.interval,
        reasons=tuple(reasons),
    )


def _from(size: float | None, does: str, what: str) -> str:
    if size is None:
        return f"no passes that {does}"
    return f"passes that {does} {what.format(f'{size:,.0f}')} and more"


def _break_even(group: _Group, best: Deployment) -> tuple[float | None, float | None]:
    """Requests that write, and tokens that are read, from which on balancing saves 1 % of a pass.

    On groups as wide as the one that was chosen, with its slots and split; where it does not balance, with a
    slot more.
    """
    if group.topology.gpus == 1 or (not group.spare and group.slots >= group.machine.model.experts):
        return None, None
    ways = (best.split,) if best.split != "static" else SPLITS[1:]
    if not group.spare:
        group = _Group(group.machine, group.traffic, 1, group.room.memory / 1e9, group.layers_L)
    prompt = group.traffic.prompt

    def saves(readers: float, tokens: float, writers: float) -> bool:
        plain = group.pass_seconds(readers, tokens, writers, "static")
        quick = min(group.pass_seconds(readers, tokens, writers, way) for way in ways)
        return quick < (1 - PAYS) * plain

    most = max(best.requests, 1.0)
    return (
        _from_on(lambda size: saves(0.0, prompt, size), most),
        _from_on(
            lambda size: saves(max(size / prompt, 1.0), min(size, prompt), 0.0),
            float(READS * group.topology.gpus),
        ),
    )


def _from_on(pays: Callable[[float], bool], most: float) -> float | None:
    """The least size from which on it pays in all that are tried, by halves, up to the largest."""
    if not pays(most):
        return None
    low = high = most
    while high > 1:
        low = max(high / 2, 1.0)
        if not pays(low):
            break
        high = low
    if high == low:
        return high
    for _ in range(3):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if pays(middle) else (middle, high)
    return high
