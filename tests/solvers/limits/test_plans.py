"""Plans under limits: each limit alone, all together, and what is impossible."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import moeless_opt as mo
from moeless_opt.api import make_problem
from moeless_opt.problems.spec.generators import lognormal

LOAD = lognormal(2, 12, tokens=10**5, sigma=1.0, seed=1)
TOPOLOGY = mo.uniform(3, 2, slots=4)


def solved(**limits: object) -> mo.Plan:
    plan = mo.plan(LOAD, TOPOLOGY, limits=mo.Limits(**limits))  # type: ignore[arg-type]
    assert plan.certificate.solver == "auto"
    return plan  # already verified


def test_replica_limits() -> None:
    plan = solved(min_replicas=2, max_replicas=2)
    assert (plan.replicas_LE == 2).all()
    assert solved(max_replicas=1).replicas_LE.max() == 1
    assert (solved(max_layer_replicas=15).replicas_LE.sum(1) == 15).all()
    assert solved(max_total_replicas=27).replicas == 27


def test_total_bytes() -> None:
    plan = mo.plan(LOAD, TOPOLOGY, expert_bytes=[10, 30], limits=mo.Limits(max_total_bytes=600))
    used = int((plan.slots_LGC >= 0).sum((1, 2)) @ np.array([10, 30]))
    assert 570 < used <= 600


def test_pins_bans_and_domains() -> None:
    pins = ((-1, 3, 0), (1, 4, 5))
    bans = tuple((-1, 0, g) for g in range(5))
    plan = solved(pinned=pins, forbidden=bans, spread=1)
    assert plan.gpus_of(0, 0) == [5]
    assert 0 in plan.gpus_of(0, 3)
    assert 5 in plan.gpus_of(1, 4)
    wide = solved(spread=2)
    for expert in range(12):
        assert len({g // 2 for g in wide.gpus_of(0, expert)}) >= 2


def test_pins_in_one_domain_do_not_count_for_its_spread() -> None:
    gpus = [{"node": 0, "slots": s, "domain": d} for s, d in ((1, 0), (2, 0), (2, 0), (3, 1))]
    topology = mo.Topology.from_dict({"kind": "explicit", "gpus": gpus})
    plan = mo.plan([[16.0, 5.0]], topology, limits=mo.Limits(pinned=((0, 1, 0), (0, 1, 1)), spread=2))
    assert plan.gpus_of(0, 1) == [0, 1, 3]
    assert 3 in plan.gpus_of(0, 0)
    with pytest.raises(mo.InfeasibleError):  # two pins and a third replica are one too many
        mo.plan(
            [[16.0, 5.0]], topology, limits=mo.Limits(pinned=((0, 1, 0), (0, 1, 1)), spread=2, max_replicas=2)
        )


def test_equal_split_and_live_replicas() -> None:
    live = mo.plan(LOAD, TOPOLOGY)
    again = mo.plan(LOAD, TOPOLOGY, current=live, split="equal", limits=mo.Limits(max_replicas=3))
    fresh = mo.plan(LOAD, TOPOLOGY, split="equal", limits=mo.Limits(max_replicas=3))
    assert again.replicas_LE.max() <= 3
    assert again.moves.fraction < 0.6
    assert fresh.imbalance_L.max() < 1.6


def test_cv_sizing_uses_few_replicas() -> None:
    plan = mo.plan(LOAD, TOPOLOGY, split="equal", sizing=mo.Sizing(policy="cv", cv=0.6))
    piece = np.repeat(LOAD[0] / plan.replicas_LE[0], plan.replicas_LE[0])
    assert piece.std() / piece.mean() <= 0.6 + 1e-9
    assert plan.replicas < 2 * 24


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (
            {"pinned": tuple((0, e, 0) for e in range(5))},
            "5 experts are pinned to GPU 0 in layer 0, it has room for 4",
        ),
        (
            {"forbidden": tuple((0, 7, g) for g in range(6))},
            "in layer 0, expert 7 may be on 0 GPUs; it needs 1",
        ),
        ({"spread": 4}, "limits.spread: 4 failure domains are wanted, 3 have room"),
        ({"max_total_replicas": 23}, "limits.max_total_replicas"),
        ({"min_replicas": 3}, "12 experts with 3 replicas each need 36 slots per layer, the GPUs have 24"),
        ({"forbidden": tuple((-1, e, g) for e in range(10) for g in range(4))}, "no GPU was found"),
    ],
)
def test_impossible_limits_say_why(limits: dict[str, object], message: str) -> None:
    with pytest.raises(mo.InfeasibleError, match=message.replace(".", r"\.")):
        solved(**limits)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_coverage_is_found_whenever_it_exists(data: st.DataObject) -> None:
    """Bans at random: with one replica per expert this is a bipartite matching, decided exactly."""
    import networkx as nx

    experts, gpus, slots = (
        data.draw(st.integers(1, 6)),
        data.draw(st.integers(1, 4)),
        data.draw(st.integers(1, 2)),
    )
    assume(experts <= gpus * slots)
    pairs = [(e, g) for e in range(experts) for g in range(gpus)]
    banned = data.draw(st.sets(st.sampled_from(pairs)))
    graph = nx.Graph()
    left = [("e", e) for e in range(experts)]
    graph.add_nodes_from(left)
    graph.add_edges_from((("e", e), (g, c)) for e, g in pairs if (e, g) not in banned for c in range(slots))
    possible = len(nx.bipartite.maximum_matching(graph, left)) // 2 == experts
    limits = mo.Limits(forbidden=tuple((0, e, g) for e, g in sorted(banned)), max_replicas=1)
    problem = make_problem(np.arange(1.0, experts + 1)[None], mo.uniform(1, gpus, slots=slots), limits=limits)
    if possible:
        assert mo.solve(problem).plan is not None
    else:
        with pytest.raises(mo.InfeasibleError):
            mo.solve(problem)


def test_large_loads_under_a_limit_on_all_replicas() -> None:
    limits = mo.Limits(max_total_replicas=6)
    plan = mo.plan([[1e12] * 3], mo.uniform(2, 2, slots=2), split="equal", limits=limits)
    assert plan.imbalance_L[0] == pytest.approx(4 / 3)
