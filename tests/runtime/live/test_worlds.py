"""The runtime on real processes: every test starts its own ranks and lets them assert."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

World = Callable[..., list[Any]]


def test_outputs_are_those_of_static_expert_parallelism(run_world: World) -> None:
    """Random uneven placements under traffic: the same bits in fp64, bf16 and fp32, whatever the top-k."""
    results = run_world("worker_placement.py", 4)
    assert set(results[0]) == {"fp64 top-2", "bf16 top-2", "fp32 top-3"}
    for case in results[0].values():
        assert case["moving"] == 0.0
        assert case["detached"] == 0.0
        assert case["bytes"] > 0
        assert case["waits"] == 0


def test_the_python_of_the_runtimes_page_runs(run_world: World) -> None:
    page = Path(__file__).resolve().parents[3] / "docs" / "runtime.md"
    if not page.is_file():
        pytest.skip("the documentation is not here")
    assert run_world("worker_docs.py", 1) == [page.read_text(encoding="utf-8").count("```py\n")]


def test_two_expert_parallel_groups_plan_for_themselves(run_world: World) -> None:
    placements = run_world("worker_groups.py", 4)
    assert placements[0] == placements[1]
    assert placements[2] == placements[3]
    assert placements[0] != placements[2]


def test_plans_refused_replaced_damaged_late_and_what_is_observed(run_world: World) -> None:
    """The assertions stand in the script; here what it measured."""
    results = run_world("worker_control.py", 4)
    memory, shares = results[0]["memory"], results[0]["shares"]
    assert 0 < memory["extra_bytes_used"] <= memory["extra_bytes_allowed"]
    assert max(shares["balanced"]) < max(shares["equal"])


@pytest.mark.parametrize(
    ("home", "deaths", "left"),
    [("pinned", ("2@6.2", "1@20.1"), [0, 3]), ("mapped", ("0@5.0", "3@17.3", "2@26.1"), [1])],
)
def test_survivors_of_killed_ranks_go_on_with_the_same_outputs(
    run_world: World, home: str, deaths: tuple[str, ...], left: list[int]
) -> None:
    results = run_world("worker_faults.py", 4, home, *deaths, expect_killed=len(deaths))
    for rank, result in enumerate(results):
        if rank not in left:
            assert result is None
            continue
        assert result["worst"] == 0.0
        assert result["ranks"] == left
        assert [r["lost"] for r in result["recoveries"]] == [[int(d.split("@")[0])] for d in deaths]
        assert all(r["bytes"] > 0 for r in result["recoveries"])
        assert any(r["migrating"] for r in result["recoveries"])


def test_a_death_while_every_pass_plans_its_own_layers(run_world: World) -> None:
    results = run_world("worker_faults.py", 4, "layered", "2@9.2", "0@21.1", expect_killed=2)
    for result in (results[1], results[3]):
        assert result["ranks"] == [1, 3]
        assert result["worst"] == 0.0
        assert [r["lost"] for r in result["recoveries"]] == [[2], [0]]


def test_ranks_that_hand_plans_in_at_different_moments_never_part(run_world: World) -> None:
    results = run_world("worker_chaos.py", 4)
    assert all(r["done"] > 0 for r in results)
    assert any(r["superseded"] > 0 for r in results)


def test_a_death_during_a_recovery(run_world: World) -> None:
    results = run_world("worker_faults.py", 4, "mapped", "2@6.2", "0@recovery", expect_killed=2)
    for result in (results[1], results[3]):
        assert result["ranks"] == [1, 3]
        assert result["worst"] == 0.0
        (recovery,) = result["recoveries"]
        assert recovery["lost"] == [0, 2]


def test_a_rank_that_hangs_is_left_behind_and_told_so(run_world: World) -> None:
    results = run_world("worker_faults.py", 4, "pinned", "stop", "1@7.1")
    assert results[1] == {"evicted": True}
    for result in (results[0], results[2], results[3]):
        assert result["ranks"] == [0, 2, 3]
        assert result["worst"] == 0.0
        (recovery,) = result["recoveries"]
        assert recovery["lost"] == [1]


def test_a_slow_rank_is_no_dead_one_and_a_dead_one_may_come_back(run_world: World) -> None:
    results = run_world("worker_hearts.py", 3, "stopped")
    for rank, result in enumerate(results):
        assert result["worst"] == result["detached"] == 0.0
        assert result["ranks"] == [0, 1, 2]
        assert all(row > 0 for rows in result["held"] for row in rows)
        if rank == 1:
            assert (result["lost"], result["joined"]) == ([[]], [[1]])
        else:
            assert (result["lost"], result["joined"]) == ([[1], []], [[], [1]])
            # Not by the timeout of 120 s.
            assert "rank 1 has given no sign of life for 1 s" in result["cause"][0] or (
                result["cause"][0] == "another rank has lost one"
            )


def test_a_process_started_anew_takes_the_place_of_a_killed_one(run_world: World) -> None:
    """It is let in with the options that the others have, gets its experts, and all can detach again."""
    results = run_world("worker_hearts.py", 3, "anew", expect_killed=1)
    for rank, result in enumerate(results):
        assert result["worst"] == 0.0
        assert result["ranks"] == [0, 1, 2]
        assert all(row > 0 for rows in result["held"] for row in rows)
        assert result["joined"][-1] == [1]
        assert result["lost"][0] == ([] if rank == 1 else [1])


@pytest.mark.parametrize("where", ["observed", "experts"])
def test_a_pass_that_ends_early_on_one_rank_never_gives_wrong_outputs(run_world: World, where: str) -> None:
    first, second = run_world("worker_edges.py", 2, where)
    assert first["worst"] == second["worst"] == 0.0
    assert first["seen"][0] == "MemoryError"
    if where == "observed":  # the ranks see it at the next exchange, and go on together
        assert first["seen"][1:] == ["out of step", *["done"] * 4]
        assert second["seen"] == ["out of step", *["done"] * 4]
        assert "rank 0 in layer 0 of pass 8; rank 1 in layer 2 of pass 7" in first["said"] == second["said"]
    else:  # one waits for tokens and one for counts: the connection breaks or times out
        assert "RankLostError" in second["seen"]


def test_a_home_copy_that_cannot_be_read_ends_a_recovery_with_one_error(run_world: World) -> None:
    """On all survivors, and not in endless attempts."""
    results = run_world("worker_edges.py", 4, "unreadable", expect_killed=1)
    for rank in (0, 1, 3):
        assert results[rank]["step"] == 1
        assert results[rank]["error"].startswith(
            "MoelessError: restoring failed: a home copy could not be read"
        )
    assert any("Input/output error" in result["error"] for result in results if result)


def test_a_survivor_without_memory_ends_a_recovery_with_one_error(run_world: World) -> None:
    results = run_world("worker_edges.py", 4, "cramped", expect_killed=1)
    for rank in (0, 1, 3):
        assert results[rank]["step"] == 1
        assert "no memory for an arrival on ranks [1]" in results[rank]["error"]


def test_what_one_rank_alone_is_told_is_heard_of_on_all(run_world: World) -> None:
    assert run_world("worker_edges.py", 2, "uneven") == ["not handed in on ranks [1] yet", ""]


def test_an_attach_that_fails_on_one_rank_is_heard_of_on_all(run_world: World) -> None:
    """Not after the timeout of 600 s, and with the reason."""
    heard, own = run_world("worker_edges.py", 2, "alone")
    assert "exceed the limit of 1000" in own
    assert heard == f"attach has failed on another rank: rank 1 has left: MemoryError: {own}"


def test_training_is_refused_by_name(run_world: World) -> None:
    said = [
        "the hidden states of MoE layer 0",
        "",
        "the router of MoE layer 1",
        "the experts of MoE layer 1",
        "the experts of MoE layer 1",
        "",
    ]
    assert run_world("worker_edges.py", 2, "gradients") == [said, said]


def test_a_death_while_home_copies_are_refilled(run_world: World) -> None:
    results = run_world("worker_edges.py", 4, "refill", expect_killed=2)
    for result in results[:2]:
        assert result == {"worst": 0.0, "ranks": [0, 1], "copies": [2] * 24}


def test_detach_gives_parameters_back_as_they_were(run_world: World) -> None:
    for result in run_world("worker_edges.py", 2, "detached"):
        assert result == {"changed": [], "same": True}


def test_grouped_experts_give_the_same_outputs(run_world: World) -> None:
    """Weights of every class of stock experts, under any placement, and given back as they were."""
    for results in run_world("worker_grouped.py", 2):
        for name, case in results.items():
            allowed = 2e-6 if "fp32" in name else 1.6e-2
            assert max(case["moving"], case["settled"]) <= allowed * case["scale"], name


def test_transformers_models_give_the_same_logits(run_world: World) -> None:
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    results = run_world("worker_transformers.py", 2, expect_killed=1)
    assert set(results[0]) > {"mixtral", "survivor"}
    for name, (moving, detached) in results[0].items():
        assert moving < 1e-5, name
        assert detached == 0.0, name


def test_a_slow_rank_is_given_less(run_world: World) -> None:
    """Twice as slow in its experts: found by all ranks alike, and planned and shared for."""
    plain, followed = run_world("worker_speeds.py", 4, "2")[0]
    assert plain["speed"] is None
    assert followed["speed"] == pytest.approx([1, 1, 1, 0.5])
    assert plain["share"] == pytest.approx(1 / 4, abs=0.01)
    assert followed["share"] == pytest.approx(0.5 / 3.5, abs=0.02)
    assert plain["imbalance"] > 1.5
    assert followed["imbalance"] < 1.05
    assert followed["makespan_ms"] < 0.65 * plain["makespan_ms"]
