"""Hypothesis strategies for instances, plans made without any solver, a slow oracle of time, a stop."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from moeless_opt.problems.io.traces import TokenTraces
from moeless_opt.problems.plan.objective import judged
from moeless_opt.problems.plan.plan import Certificate, Payback, Plan, count_moves
from moeless_opt.problems.plan.result import StoppedBy
from moeless_opt.problems.spec.loads import Loads
from moeless_opt.problems.spec.placement import Placement, equal_shares
from moeless_opt.problems.spec.problem import Problem
from moeless_opt.problems.spec.time_model import TimeModel
from moeless_opt.problems.spec.topology import Links, Topology
from moeless_opt.problems.spec.wishes import Limits, Objective, Sizing
from moeless_opt.solvers.core.stopping import NeverStop

few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])

SPEEDS = (0.5, 0.75, 1.0, 1.5, 2.0)


class After(NeverStop):
    """Stop at the n-th question."""

    def __init__(self, asks: int) -> None:
        self.asks = asks

    def __call__(self, best: float = float("inf"), bound: float = 0.0) -> StoppedBy:
        self.asks -= 1
        return StoppedBy.TIME if self.asks < 0 else StoppedBy.NOTHING


@st.composite
def topologies(
    draw: Any, *, max_gpus: int = 6, max_slots: int = 4, memory: bool = False, same: bool = False
) -> Topology:
    """Any small cluster: uneven nodes, slots, speeds and failure domains."""
    nodes = draw(st.integers(1, 3))
    gpus = draw(st.integers(nodes, max(max_gpus, nodes)))
    node_G = sorted([*range(nodes), *(draw(st.integers(0, nodes - 1)) for _ in range(gpus - nodes))])
    slots_G = draw(st.lists(st.integers(1, max_slots), min_size=gpus, max_size=gpus))
    speed_G = draw(st.lists(st.sampled_from(SPEEDS), min_size=gpus, max_size=gpus))
    domain_G = draw(st.none() | st.lists(st.integers(0, 2), min_size=gpus, max_size=gpus))
    memory_G = draw(st.lists(st.integers(10**6, 10**9), min_size=gpus, max_size=gpus)) if memory else None
    return Topology(
        node_G=node_G,
        speed_G=[1.0] * gpus if same else speed_G,
        slots_G=[slots_G[0]] * gpus if same else slots_G,
        memory_G=memory_G,
        domain_G=domain_G,
        links=draw(
            st.builds(
                Links,
                intra_node=st.sampled_from((1e9, 450e9)),
                inter_node=st.sampled_from((1e8, 50e9)),
                latency=st.sampled_from((0.0, 1e-5)),
            )
        ),
        name=draw(st.sampled_from(("", "rack"))),
    )


def load_arrays(*shape: int) -> Any:
    """Loads with zeros, ties and a wide range; never all zero."""
    size = int(np.prod(shape))
    one = st.one_of(st.just(0.0), st.integers(0, 50).map(float), st.floats(0.001, 1e6))
    values = st.lists(one, min_size=size, max_size=size).filter(any)
    return values.map(lambda flat: np.array(flat).reshape(shape))


@st.composite
def loads(draw: Any, layers: int, experts: int, *, max_scenarios: int = 3, nodes: int = 0) -> Loads:
    scenarios = draw(st.integers(1, max_scenarios))
    by_node = draw(load_arrays(scenarios, layers, nodes, experts)) if nodes else None
    load_TLE = by_node.sum(2) if by_node is not None else draw(load_arrays(scenarios, layers, experts))
    first = draw(st.integers(0, 3))
    return Loads(
        load_TLE=load_TLE,
        weight_T=draw(st.none() | st.lists(st.integers(1, 5), min_size=scenarios, max_size=scenarios)),
        layers=tuple(range(first, first + layers)),
        scenarios=tuple(f"s{t}" for t in range(scenarios)) if draw(st.booleans()) else (),
        skipped=tuple(range(first)),
        load_TLNE=by_node,
        source=draw(st.sampled_from(("", "drawn"))),
        notes=("2 steps summed",) if draw(st.booleans()) else (),
    )


def time_models() -> Any:
    """Tokens only, linear with activation cost, and measured curves."""
    curve = st.builds(
        TimeModel,
        curve_tokens=st.just([0.0, 16.0, 256.0]),
        curve_activated=st.just([0.0, 2.0, 8.0]),
        curve_time=st.lists(
            st.lists(st.integers(1, 100).map(float), min_size=3, max_size=3), min_size=3, max_size=3
        ).map(lambda rows: np.sort(np.sort(rows, 0), 1)),
        unit=st.just("s"),
    )
    linear = st.builds(
        TimeModel,
        token_cost=st.sampled_from((0.5, 1.0, 3.0)),
        activation_cost=st.sampled_from((0.0, 7.0)),
        launch=st.sampled_from((0.0, 2.0)),
    )
    return st.just(TimeModel()) | linear | curve


def random_slots(rng: np.random.Generator, capacity_LG: Any, experts: int) -> np.ndarray:
    """A valid placement: every expert somewhere, never twice on a GPU; some slots stay empty."""
    layers, gpus = capacity_LG.shape
    slots = np.full((layers, gpus, int(capacity_LG.max())), -1, dtype=np.int32)
    for layer in range(layers):
        free = capacity_LG[layer].copy()
        held: list[list[int]] = [[] for _ in range(gpus)]
        for expert in rng.permutation(experts):
            g = int(rng.choice(np.flatnonzero(free > 0)))
            held[g].append(int(expert))
            free[g] -= 1
        for g in range(gpus):
            for expert in rng.permutation(experts)[: rng.integers(0, free[g] + 1)]:
                if expert not in held[g]:
                    held[g].append(int(expert))
            slots[layer, g, : len(held[g])] = held[g]
    return slots


def full_slots(rng: np.random.Generator, slots_LGC: Any, problem: Problem) -> np.ndarray:
    """The same slots, all full: with experts that the GPU lacks, or any where second copies may be."""
    wide = max(int(problem.capacity_LG.max()), slots_LGC.shape[2])
    slots = np.full((*slots_LGC.shape[:2], wide), -1, dtype=np.int32)
    slots[:, :, : slots_LGC.shape[2]] = slots_LGC
    for layer, gpu in np.ndindex(slots.shape[:2]):
        row = slots[layer, gpu]
        while (row >= 0).sum() < problem.capacity_LG[layer, gpu]:
            free = (
                range(problem.experts) if problem.fill == "copies" else set(range(problem.experts)) - {*row}
            )
            row[int(np.flatnonzero(row < 0)[0])] = rng.choice(sorted(free))
    return slots


def random_shares(rng: np.random.Generator, slots_LGC: Any, experts: int) -> np.ndarray:
    """Shares that sum to 1 over each expert's replicas, some of them 0."""
    raw = rng.random(slots_LGC.shape) * (rng.random(slots_LGC.shape) > 0.2) + 1e-9
    raw[slots_LGC < 0] = 0.0
    for layer in range(slots_LGC.shape[0]):
        for expert in range(experts):
            at = slots_LGC[layer] == expert
            raw[layer][at] /= raw[layer][at].sum()
    return raw


def plan_of(problem: Problem, slots_LGC: Any, share_LGC: Any = None, scenario_share_TLGC: Any = None) -> Plan:
    """A plan with true figures for a placement; its bound is 0, which claims nothing."""
    if share_LGC is None:
        share_LGC = equal_shares(slots_LGC, problem.experts)
    told = judged(problem, slots_LGC, share_LGC, scenario_share_TLGC)
    current = None if problem.current is None else problem.current.slots_LGC
    return Plan(
        slots_LGC=slots_LGC,
        share_LGC=share_LGC,
        experts=problem.experts,
        layers=problem.loads.layers,
        split=problem.split,
        time_LG=told.time_LG,
        imbalance_L=told.imbalance_L,
        moves=count_moves(slots_LGC, current, problem.experts, problem.bytes_L),
        certificate=Certificate(
            value_L=told.value_L,
            lower_bound_L=np.zeros(problem.layers),
            bound_L=("none",) * problem.layers,
            solver="drawn",
            seconds=0.25,
        ),
        made_for=problem,
        unit=problem.time.unit,
        name=problem.name,
        scenario_share_TLGC=scenario_share_TLGC,
    )


@st.composite
def problems(draw: Any, *, plain: bool = False, max_layers: int = 3) -> Problem:
    """A feasible problem. `plain`: tokens only, one scenario, equal GPUs, nothing live."""
    topology = draw(topologies(same=plain, memory=False))
    room = int(topology.slots_G.sum())
    experts = draw(st.integers(1, min(room, 8)))
    room = int(np.minimum(topology.slots_G, experts).sum())
    experts = min(experts, room)
    layers = draw(st.integers(1, max_layers))
    by_node = not plain and draw(st.booleans())
    load = draw(
        loads(layers, experts, max_scenarios=1 if plain else 3, nodes=topology.nodes if by_node else 0)
    )
    if plain:
        split = draw(st.sampled_from(("fractional", "equal")))
        return Problem(loads=load, topology=topology, split=split)
    problem = Problem(
        loads=load,
        topology=topology,
        expert_bytes_L=draw(st.none() | st.lists(st.integers(1, 10**9), min_size=layers, max_size=layers)),
        split=draw(st.sampled_from(("fractional", "equal"))),
        sizing=draw(st.sampled_from((Sizing(), Sizing(policy="cv", cv=0.3, ddof=1)))),
        time=draw(time_models()),
        objective=draw(
            st.builds(
                Objective,
                balance_tolerance=st.sampled_from((0.0, 0.01, 1)),
                horizon=st.none() | st.just(1000),
                risk=st.sampled_from(("expected", "cvar", "worst", "sigma")),
                sigma=st.sampled_from((0, 0.5, 1)),
                cvar_alpha=st.sampled_from((0, 0.5, 0.9)),
            )
        ),
        limits=draw(st.sampled_from((Limits(), Limits(max_replicas=8, max_moves=100)))),
        name=draw(st.sampled_from(("", "drawn"))),
    )
    if draw(st.booleans()):
        rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        slots = random_slots(rng, problem.capacity_LG, experts)
        problem = problem.replace(current=Placement(slots_LGC=slots, experts=experts))
    return problem


@st.composite
def planned(draw: Any, **kind: Any) -> tuple[Problem, Plan]:
    """A problem with a valid plan."""
    problem = draw(problems(**kind))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    slots = random_slots(rng, problem.capacity_LG, problem.experts)
    share = None if problem.split == "equal" else random_shares(rng, slots, problem.experts)
    each = None
    if share is not None and problem.loads.shape[0] > 1 and draw(st.booleans()):
        each = np.array([random_shares(rng, slots, problem.experts) for _ in problem.loads.load_TLE])
    plan = plan_of(problem, slots, share, each)
    if draw(st.booleans()):
        plan = plan.replace(payback=Payback(saved_per_pass=draw(st.floats(-1, 1)), cost=0.5))
    return problem, plan


def slow_time(model: TimeModel, tokens: float, activated: float, speed: float) -> float:
    """One GPU's time, point by point."""
    if model.curve_time is None:
        return (model.launch + model.activation_cost * activated + model.token_cost * tokens) / speed
    assert model.curve_tokens is not None
    assert model.curve_activated is not None
    grid_K, grid_J = model.curve_tokens.tolist(), model.curve_activated.tolist()

    def column(k: int) -> float:
        return float(np.interp(activated, grid_J, model.curve_time[k]))  # type: ignore[index]

    if tokens <= grid_K[0]:
        value = column(0)
    elif tokens >= grid_K[-1]:  # the last segment goes on
        slope = (column(-1) - column(-2)) / (grid_K[-1] - grid_K[-2])
        value = column(-1) + slope * (tokens - grid_K[-1])
    else:
        value = float(np.interp(tokens, grid_K, [column(k) for k in range(len(grid_K))]))
    return value / speed


def traces_of(seed: int, requests: int = 5, layers: int = 2, top_k: int = 2, experts: int = 6) -> TokenTraces:
    """Requests of random routing."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 9, requests)
    return TokenTraces(
        experts_TLK=rng.integers(0, experts, (int(tokens.sum()), layers, top_k)),
        offsets=np.concatenate([[0], np.cumsum(tokens)]),
        experts=experts,
        prompt_tokens=np.array([rng.integers(0, n) for n in tokens]),
    )
