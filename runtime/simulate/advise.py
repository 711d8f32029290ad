"""What to configure: width and redundant experts against the KV cache, split, interval, keep-alive.

A deployment of N GPUs serves as N / W groups, each with the whole model over W GPUs. A narrow group holds
more experts on each GPU and leaves less for the KV cache, so that fewer requests are in flight; a redundant
expert levels the GPUs and takes cache. What both come to is worked out in the simulator's times (`Machine`):
a cycle in which every request in flight reads its prompt once and writes its answer, token by token.

Placements are planned on loads of one time and judged on those of another (the next scenario of a recording,
the next stretch of generated traffic), so that what drift takes away is not counted as gained.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moeless_opt.api import plan
from moeless_opt.problems.arrays import FloatArray, SlotArray
from moeless_opt.problems.errors import InfeasibleError
from moeless_opt.problems.plan import TimeTable
from moeless_opt.problems.spec import ModelSpec, Topology, contiguous, equal_shares
from moeless_opt.runtime.simulate.hardware import slots_of
from moeless_opt.runtime.simulate.machine import Machine
from moeless_opt.runtime.simulate.memory import Room
from moeless_opt.runtime.simulate.settings import Settings
from moeless_opt.runtime.simulate.shares import Placed, SplitCost, TimedRule

__all__ = ["Advice", "Deployment", "Offered", "advise"]

LAYERS = 6
"""Layers that are looked at; the others are taken to be like them."""

DRAWS = 12
"""Passes that are drawn for each size of a batch."""

READS = 8192
"""Tokens of prompts in a pass."""

SPARE = (0, 1, 2, 3, 4, 6, 8)
"""Slots of a GPU and layer beyond one copy of each expert that are looked at."""

CLOSE = 0.01
"""What two settings may differ by to be alike: then the one that takes less memory is advised."""

DECIDE = 1.0
"""Seconds between plans at the soonest: what engines measure their loads over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offered:
    """What is served.

    Parameters
    ----------
    share_TLE : array, shape [T, L, E]
        Shares of the experts in consecutive stretches of time, summing to 1 in each layer.
    prompt, answer : float
        Tokens of a request, mean.
    rate : float or None
        Requests per second; None: as many as there is room for.
    most_requests : int
        In flight on a GPU.
    source : str
        Where the loads come from.
    """

    share_TLE: FloatArray
    prompt: float
    answer: float
    rate: float | None
    most_requests: int
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """One setting, and what it comes to.

    Parameters
    ----------
    width, groups : int
        GPUs of a group, and groups.
    slots, redundant : int
        Replicas of a GPU and layer; redundant experts of a layer (0: one copy of each).
    split : str
        ``static`` (no balancing), ``equal``, ``fractional`` or ``live``: how replicas share tokens.
    expert_bytes : float
        Of one GPU.
    cache_tokens, requests : float
        Of a group: tokens in the KV cache; requests in flight that it has room for.
    batch : float
        Requests in flight of a group at the rate that was asked for; else `requests`.
    token_s, first_s : float
        Seconds for a token of an answer, and for reading a prompt.
    capacity : float
        Tokens of answers per second that all GPUs together can write.
    imbalance : float
        Largest over mean GPU tokens at that batch.
    """

    width: int
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

    @property
    def gpu_hours(self) -> float:
        """GPU hours for a million tokens of answers at capacity."""
        return self.width * self.groups / 3600 * 1e6 / self.capacity


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """What to configure, and why.

    Parameters
    ----------
    choices : tuple of Deployment
        The best of each width and number of slots, fitting ones only, the best first.
    best, static : Deployment
        What is advised, and the best that never balances.
    rate : float or None
        Requests per second that were asked for.
    served : float
        Requests per second that the advised setting can serve.
    even : float or None
        Tokens of a pass from which on balancing pays by 1 %; None where it never does.
    interval, every : float, int
        Seconds, and writing passes, between two plans.
    tolerance : float
        Balance to give up for fewer moves.
    keep_alive : float
        Seconds that unused replicas stay.
    reasons : tuple of str
        For people.
    """

    model: ModelSpec
    choices: tuple[Deployment, ...]
    best: Deployment
    static: Deployment
    rate: float | None
    served: float
    even: float | None
    interval: float
    every: int
    tolerance: float
    keep_alive: float
    reasons: tuple[str, ...]


class _Group:
    """A group of GPUs with so many slots, and what its layers take."""

    def __init__(self, machine: Machine, traffic: Offered, spare: int, memory: float | None) -> None:
        model, gpus = machine.model, machine.topology.gpus
        self.spare, self.traffic = spare, traffic
        self.slots = -(-model.experts // gpus) + spare
        self.topology = slots_of(machine.topology, self.slots)
        self.machine = machine.replace(topology=self.topology)
        self.room = Room.of(self.machine, memory)
        chosen = np.unique(np.linspace(0, model.layers - 1, min(LAYERS, model.layers)).round().astype(int))
        self.share_TLE = traffic.share_TLE[:, chosen]
        self.split_s = Settings().split_seconds(model.experts, gpus)
        self.table = TimeTable.of(
            machine.time, min(self.slots, model.experts), per_token=machine.link_per_token
        )

    @property
    def redundant(self) -> int:
        """Copies of a layer beyond one of each expert, every slot full."""
        return self.slots * self.topology.gpus - self.machine.model.experts if self.spare else 0

    @cached_property
    def static_LGC(self) -> SlotArray:
        """One copy of each expert, in blocks."""
        layers = self.share_TLE.shape[1]
        return contiguous(self.machine.model.experts, np.full((layers, self.topology.gpus), self.slots))

    @cached_property
    def planned(self) -> list[dict[str, tuple[SlotArray, FloatArray]]]:
        """Slots and shares by split, planned on each stretch of time."""
        found = []
        for load_LE in self.share_TLE[:-1] * 1e6:
            ways = {}
            for split in ("equal", "fractional"):
                made = plan(load_LE, self.topology, split=split)
                ways[split] = (np.asarray(made.slots_LGC), np.asarray(made.share_LGC))
            found.append(ways)
        return found

    def layer(self, tokens: float, split: str) -> tuple[float, float]:
        """Mean seconds of a layer with so many tokens, and imbalance, on loads that were not planned on."""
        model, rng = self.machine.model, np.random.default_rng(0)
        pairs = int(max(round(tokens), 1)) * model.top_k
        seconds, most, mean = [], 0.0, 0.0
        for at, share_LE in enumerate(self.share_TLE[1:]):
            shape = (DRAWS, *share_LE.shape)
            load_BLE = rng.multinomial(pairs, np.broadcast_to(share_LE, shape)).astype(np.float64)
            slots_LGC, share_LGC = self._placed(at, split)
            placed = Placed(self.machine, self.table, slots_LGC, share_LGC, brief=True)
            if split == "live":
                placed.split = SplitCost(self.split_s, len(share_LE))
                times, _ = TimedRule().times(load_BLE, placed)
            else:
                times = placed.times(load_BLE, placed.spread(share_LGC, DRAWS))
            seconds.append(float(times.layer_BL.mean()))
            most += float(times.tokens_BLG.max(2).sum())
            mean += float(times.tokens_BLG.mean(2).sum())
        return float(np.mean(seconds)), most / max(mean, 1e-30)

    def _placed(self, at: int, split: str) -> tuple[SlotArray, FloatArray]:
        if split == "static":
            return self.static_LGC, equal_shares(self.static_LGC, self.machine.model.experts)
        return self.planned[at]["equal" if split == "equal" else "fractional"]

    def pass_seconds(self, tokens: float, cached: float, split: str) -> float:
        """Of a whole pass with so many tokens in it and in the cache."""
        rest = float(self.machine.rest(np.array([tokens]), np.array([cached]))[0])
        return self.machine.model.layers * self.layer(tokens, split)[0] + rest

    def choice(self, groups: int, split: str) -> Deployment:
        """What the setting comes to."""
        traffic, gpus = self.traffic, self.topology.gpus
        cache = self.room.tokens(self.topology)
        each = traffic.prompt + traffic.answer
        requests = max(min(cache / each, float(traffic.most_requests * gpus)), 1.0)
        read_s = self.pass_seconds(READS, READS, split) / READS * traffic.prompt
        held = traffic.prompt + traffic.answer / 2

        def token_s(batch: float) -> float:
            return self.pass_seconds(batch, batch * held, split)

        def rate(batch: float) -> float:
            return batch / (traffic.answer * token_s(batch) + batch * read_s)

        capacity = rate(requests)
        batch = requests
        if traffic.rate is not None and traffic.rate / groups < capacity:
            low, high = 1.0, requests
            for _ in range(8):
                middle = (low * high) ** 0.5
                low, high = (low, middle) if rate(middle) >= traffic.rate / groups else (middle, high)
            batch = high
        writes = token_s(batch) + batch * read_s / traffic.answer  # prompts of others are read in between
        return Deployment(
            width=gpus,
            groups=groups,
            slots=self.slots,
            redundant=self.redundant,
            split=split,
            expert_bytes=float(self.room.experts_G(self.topology).max()),
            cache_tokens=cache,
            requests=requests,
            batch=batch,
            token_s=writes,
            first_s=read_s,
            capacity=groups * capacity * traffic.answer,
            imbalance=self.layer(batch, split)[1],
        )


def _widths(topology: Topology, experts: int) -> list[int]:
    """GPUs that a group may have: parts of a node, or whole nodes."""
    nodes = topology.nodes
    per_node = topology.gpus // nodes
    parts = [width for width in range(1, per_node + 1) if per_node % width == 0]
    parts += [per_node * many for many in range(2, nodes + 1) if nodes % many == 0]
    return [width for width in parts if width <= experts]


def _of(topology: Topology, width: int) -> Topology:
    """The first GPUs of a machine."""
    return topology.replace(
        node_G=topology.node_G[:width],
        speed_G=topology.speed_G[:width],
        slots_G=np.ones(width, dtype=np.int64),
        memory_G=None,
        domain_G=None,
    )


def advise(machine: Machine, traffic: Offered, *, memory: float | None = None) -> Advice:
    """Compare all settings that fit.

    Parameters
    ----------
    machine : Machine
        Model and GPUs, all of them; slots are what is asked for.
    traffic : Offered
        What is served.
    memory : float, optional
        GB of each GPU for weights and the KV cache.

    Raises
    ------
    InfeasibleError
        If nothing fits.
    """
    topology, model = machine.topology, machine.model
    found: list[tuple[Deployment, _Group]] = []
    for width in _widths(topology, model.experts):
        part = machine.replace(topology=_of(topology, width))
        for spare in SPARE:
            group = _Group(part, traffic, spare, memory)
            if group.room.tokens(group.topology) < traffic.prompt + traffic.answer:
                break
            if group.slots > model.experts:
                break
            ways = ("static",) if spare == 0 else ("equal", "fractional", "live")
            ways = ("static",) if width == 1 else ways
            found += [(group.choice(topology.gpus // width, split), group) for split in ways]
    if not found:
        raise InfeasibleError(
            f"memory: {model.name} and the cache of one request fit on no group of up to {topology.gpus} "
            f"{machine.gpu}s"
        )
    order = sorted(found, key=lambda each: _merit(each[0], traffic))
    best, group = _frugal(order, traffic)
    static = min((c for c, _ in found if c.split == "static"), key=lambda c: _merit(c, traffic))
    kept: dict[tuple[int, int], Deployment] = {}
    for choice, _ in order:
        kept.setdefault((choice.width, choice.slots), choice)
    return _advice(model, tuple(kept.values()), best, group, static, traffic)


def _merit(choice: Deployment, traffic: Offered) -> tuple[float, float]:
    """Small is good: what keeps up first, by the time of an answer; else by tokens per second."""
    if traffic.rate is not None and choice.capacity >= traffic.rate * traffic.answer:
        return (0.0, choice.first_s + traffic.answer * choice.token_s)
    return (1.0, -choice.capacity)


def _frugal(order: list[tuple[Deployment, _Group]], traffic: Offered) -> tuple[Deployment, _Group]:
    """Of those that are as good as the best, the one that takes least memory, and balances least."""
    kind, value = _merit(order[0][0], traffic)
    ranks = ("static", "equal", "fractional", "live")
    near = [
        each
        for each in order
        if _merit(each[0], traffic)[0] == kind and _merit(each[0], traffic)[1] <= value + CLOSE * abs(value)
    ]
    return min(near, key=lambda each: (each[0].expert_bytes, ranks.index(each[0].split)))


def _advice(
    model: ModelSpec,
    choices: tuple[Deployment, ...],
    best: Deployment,
    group: _Group,
    static: Deployment,
    traffic: Offered,
) -> Advice:
    even = _break_even(group)
    links = group.topology.links
    slowest = links.inter_node if group.topology.nodes > 1 else links.intra_node
    # What a plan moves: EPLB nearly all slots, plans from what is live few (docs/benchmarks.md, re-planning).
    moved = (
        (0.95 if best.split == "equal" else 0.05) * best.slots * model.layers * model.expert_bytes / slowest
    )
    interval = max(DECIDE, 20 * moved)
    every = max(int(interval / best.token_s), 1)
    served = best.capacity / traffic.answer
    reasons = [
        f"{best.width} GPUs a group: {best.expert_bytes / 1e9:.1f} GB of experts on each leave room for "
        f"{best.cache_tokens:,.0f} tokens of KV cache and {best.requests:,.0f} requests in flight",
        f"against the best without balancing ({static.width} GPUs, {static.slots} slots): "
        f"{best.capacity / static.capacity - 1:+.1%} tokens/s, "
        f"{best.token_s / static.token_s - 1:+.1%} time per token, "
        f"{best.gpu_hours / static.gpu_hours - 1:+.1%} GPU hours",
        f"balancing pays by 1 % in passes of {even:,.0f} tokens and more; reading passes have {READS:,}, "
        f"writing ones {best.batch:,.0f}"
        if even is not None
        else f"balancing saves 1 % in no pass of up to {READS:,} tokens",
    ]
    if traffic.rate is not None:
        reasons.append(
            f"{traffic.rate:g} requests/s asked for, {served:.3g} can be served"
            + ("" if served >= traffic.rate else f"; {traffic.rate / served:.1f} times as many GPUs would do")
        )
    return Advice(
        model=model,
        choices=choices,
        best=best,
        static=static,
        rate=traffic.rate,
        served=served,
        even=even,
        interval=interval,
        every=every,
        tolerance=0.05 if best.split == "equal" else 0.01,
        keep_alive=2 * interval,
        reasons=tuple(reasons),
    )


def _break_even(group: _Group) -> float | None:
    """Tokens of a pass from which on balancing saves 1 % of it, on the group that was chosen."""
    if group.topology.gpus == 1:
        return None
    if not group.spare:
        group = _Group(group.machine, group.traffic, 1, group.room.memory / 1e9)

    def pays(tokens: float) -> bool:
        plain = group.pass_seconds(tokens, tokens, "static")
        return min(group.pass_seconds(tokens, tokens, way) for way in ("equal", "live")) < 0.99 * plain

    high = next((2.0**power for power in range(14) if pays(2.0**power)), None)
    if high is None:
        return None
    low = high / 2
    for _ in range(3):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if pays(middle) else (middle, high)
    return high
