"""`plan`, `solve` and `compare`: their forms, their errors, and what they promise."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import moeless_opt as mo
from moeless_opt.api import as_loads, make_problem
from moeless_opt.problems.spec.placement import contiguous
from moeless_opt.solvers.core import registry
from moeless_opt.solvers.core.features import Feature
from moeless_opt.solvers.core.finish import Built, finish
from moeless_opt.solvers.core.stopping import Clock
from tests.strategies import few, load_arrays, problems

LOAD = [[60.0, 56.0, 12.0, 12.0, 2.0, 1.0, 1.0, 1.0], [5.0, 1.0, 9.0, 4.0, 3.0, 3.0, 8.0, 7.0]]
GPUS = mo.uniform(1, 4, slots=3)


# --- what is given in which form ---------------------------------------------------------------------------


def test_whatever_can_be_loads() -> None:
    same = {name: lambda self: self for name in ("detach", "cpu")}
    torch_like = type("Tensor", (), {**same, "is_floating_point": lambda self: False})()
    torch_like.numpy = lambda: np.array([[1, 2]])
    want = mo.Loads(load_TLE=[[1.0, 2.0]])
    for form in ([[1, 2]], ((1, 2),), np.array([[1, 2]], dtype=np.uint8), np.array([[[1, 2]]]), torch_like):
        assert as_loads(form) == want
    assert as_loads(want) is want
    with pytest.raises(mo.FormatError, match=r"nothing-here\.npy"):
        as_loads("nothing-here.npy")


def test_tensors_of_any_kind_can_be_loads() -> None:
    torch = pytest.importorskip("torch")
    want = as_loads([[1.0, 2.0]])
    for kind in (torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.uint8):
        assert as_loads(torch.tensor([[1, 2]], dtype=kind)) == want
    assert as_loads(torch.tensor([[1.0, 2.0]], requires_grad=True)) == want
    for tensor in (
        torch.eye(2).to_sparse(),
        torch.ones(2, 2, device="meta"),
        torch.tensor([[1j]]),
    ):
        with pytest.raises(mo.ProblemError, match=r"^loads: (not an array of|must hold) numbers"):
            as_loads(tensor)


def test_what_is_masked_is_no_load() -> None:
    masked = np.ma.masked_array([[1.0, 2.0, 1000.0]], mask=[[0, 0, 1]])
    assert as_loads(masked) == as_loads([[1.0, 2.0, 0.0]])
    with pytest.raises(mo.ProblemError, match=r"^topology\.speed: has masked entries"):
        mo.uniform(1, 3, slots=1, speed=masked[0])


class Frame(dict[str, list[Any]]):
    """What is used of a data frame."""

    @property
    def columns(self) -> list[str]:
        return list(self)

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return np.array([list(row) for row in zip(*self.values(), strict=True)])


def test_data_frames_are_tables() -> None:
    long = {"layer": [3, 3, 4, 4], "expert": [0, 1, 0, 1], "count": [4, 3.5, 2, 1]}
    want = mo.Loads(load_TLE=[[4.0, 3.5], [2.0, 1.0]], layers=(3, 4))
    wide = {"a": [1, 2], "b": [3, 4], "c": [5, 6]}
    frames: list[Any] = [Frame]
    try:
        import pandas
    except ImportError:
        pass
    else:
        frames.append(pandas.DataFrame)
    for frame in frames:
        got = as_loads(frame(long))
        assert (got.load_TLE == want.load_TLE).all()
        assert got.layers == want.layers
        assert (as_loads(frame({"Tokens": long["count"], **long})).load_TLE == want.load_TLE).all()
        assert as_loads(frame(wide)) == as_loads([[1, 3, 5], [2, 4, 6]])
        for changes, message in (
            ({"count": [4, -3, 2, 1]}, "loads: line 2: count is '-3', must be a number >= 0"),
            ({"count": [4, 3, None, 1]}, "loads: line 3: count is '(None|nan)'"),
            ({"expert": [0, 1, 0.5, 1]}, "loads: line 3: expert is '0.5', must be a whole number from 0"),
        ):
            with pytest.raises(mo.FormatError, match=message):
                as_loads(frame(long | changes))


def test_loads_in_any_form_give_the_same_plan(tmp_path: Path) -> None:
    want = mo.plan(LOAD, GPUS)
    np.save(tmp_path / "loads.npy", LOAD)
    forms: list[Any] = [
        np.array(LOAD),
        np.array([LOAD]),
        np.array(LOAD, dtype=np.int32),
        mo.Loads(load_TLE=LOAD),
        tmp_path / "loads.npy",
        str(tmp_path / "loads.npy"),
    ]
    for form in forms:
        got = mo.plan(form, GPUS)
        assert (got.slots_LGC == want.slots_LGC).all()
        assert (got.share_LGC == want.share_LGC).all()
        assert got.problem_digest == want.problem_digest


def test_topologies_in_any_form() -> None:
    assert make_problem(LOAD, {"gpus_per_node": 4, "slots": 3}).topology == mo.uniform(1, 4, slots=3)
    assert make_problem([[1] * 8], "8xH100", model="Mixtral-8x7B").topology.memory_G is not None
    with pytest.raises(mo.ProblemError, match="topology: is int, must be a Topology, the name of a preset"):
        mo.plan(LOAD, 8)  # type: ignore[arg-type]
    with pytest.raises(mo.ProblemError, match=r"topology\.preset: '8xH1000' is unknown"):
        mo.plan(LOAD, "8xH1000")


def test_live_placements_in_any_form(tmp_path: Path) -> None:
    first = mo.plan(LOAD, GPUS)
    mo.save_plan(first, tmp_path / "live.npz")
    path = tmp_path / "live.npz"
    forms = (first, first.placement, first.slots_LGC, first.slots_LGC.tolist(), path, str(path))
    plans = [mo.plan(np.array(LOAD)[:, ::-1], GPUS, current=form) for form in forms]
    for plan in plans:
        assert not plan.moves.cold
        assert (plan.slots_LGC == plans[0].slots_LGC).all()


def test_sizing_by_a_short_rule() -> None:
    assert make_problem(LOAD, GPUS, sizing="cv=0.3").sizing == mo.Sizing(policy="cv", cv=0.3)
    assert make_problem(LOAD, GPUS, sizing="makespan=1.2").sizing == mo.Sizing(
        policy="makespan", imbalance=1.2
    )
    assert make_problem(LOAD, GPUS, sizing="cv").sizing == mo.Sizing(policy="cv")
    for rule, message in (
        ("slots=3", "sizing: is 'slots=3': 'slots' takes no value"),
        ("cv=low", "sizing: is 'cv=low': 'low' is no number"),
        ("cv=", "sizing: is 'cv=': '' is no number"),
        ("makespan=0.5", "sizing.imbalance: is 0.5"),
        ("all", "sizing.policy: is 'all'"),
    ):
        with pytest.raises(mo.ProblemError, match=message):
            mo.plan(LOAD, GPUS, sizing=rule)


def test_arguments_reach_the_problem() -> None:
    problem = make_problem(
        [LOAD, LOAD],
        GPUS,
        model=mo.model_preset("Mixtral-8x7B"),
        split="equal",
        balance_tolerance=0.05,
        objective=mo.Objective(risk="worst"),
        limits=mo.Limits(max_moves=3),
        sizing="cv",
        time=mo.TimeModel(launch=3),
        expert_bytes=[5, 6],
        name="all",
    )
    assert problem.objective == mo.Objective(risk="worst", balance_tolerance=0.05)
    assert problem.limits.max_moves == 3
    assert problem.sizing.policy == "cv"
    assert problem.time.launch == 3
    assert problem.bytes_L.tolist() == [5, 6]
    assert (problem.split, problem.name, problem.loads.shape) == ("equal", "all", (2, 2, 8))
    assert make_problem(LOAD, GPUS).objective.balance_tolerance == 0.01


# --- what comes out ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["fractional", "equal"])
def test_a_plan_has_what_is_promised(split: str, tmp_path: Path) -> None:
    plan = mo.plan(LOAD, GPUS, split=split)
    layers, gpus, slots, experts = 2, 4, 3, 8
    assert plan.slots_LGC.shape == plan.share_LGC.shape == (layers, gpus, slots)
    assert plan.slots_LGC.dtype == np.int32
    assert plan.replicas_LE.shape == (layers, experts)
    assert (plan.replicas_LE >= 1).all()
    np.testing.assert_allclose(plan.share_LGE.sum(1), 1.0, atol=1e-9)
    assert plan.imbalance_L.shape == (layers,)
    assert (plan.moves.count, plan.moves.fraction, plan.moves.cold) == (plan.replicas, 1.0, True)
    certificate = plan.certificate
    assert certificate.lower_bound_L.shape == certificate.gap_L.shape == (layers,)
    assert certificate.status in (mo.Status.OPTIMAL, mo.Status.FEASIBLE)
    assert all(certificate.bound_L)
    assert certificate.solver
    assert certificate.seconds > 0
    assert "imbalance (max/mean)" in repr(plan)
    assert "<table>" in plan._repr_html_()
    mo.save_plan(plan, tmp_path / "plan.npz")
    assert mo.load_plan(tmp_path / "plan.npz") == plan


def test_the_published_example() -> None:
    load = [[600, 560, 120, 120, 20, 10, 10, 10]]
    gpus = mo.uniform(1, 8, slots=2)
    assert mo.plan(load, gpus).time_LG.max() == pytest.approx(181.25, rel=1e-9)
    assert mo.plan(load, gpus, split="equal").time_LG.max() == pytest.approx(196 + 2 / 3, rel=1e-9)


@few
@given(problems(plain=True))
def test_solvers_give_valid_plans_that_no_bound_contradicts(problem: mo.Problem) -> None:
    values = {}
    for name in ("static", "moeless", "auto"):
        result = mo.solve(problem, name)
        assert result.plan is not None
        assert mo.violations(problem, result.plan) == []
        values[name] = result.plan.certificate.value_L
    auto = mo.solve(problem).plan
    assert auto is not None
    # one solver's bound holds for the other's plan
    for value in values.values():
        assert (auto.certificate.lower_bound_L <= value * (1 + 1e-9)).all()
    assert (values["auto"] <= values["static"] * (1 + 1e-9)).all()


@few
@given(load_arrays(1, 6), st.sampled_from(("fractional", "equal")))
def test_scaling_the_loads_scales_the_times(load: Any, split: str) -> None:
    gpus = mo.uniform(1, 3, slots=3)
    one, four = (mo.plan(load * k, gpus, split=split) for k in (1.0, 4.0))
    np.testing.assert_allclose(four.time_LG.max(1), 4 * one.time_LG.max(1), rtol=1e-9)


def test_the_same_call_gives_the_same_plan() -> None:
    load = np.random.default_rng(3).lognormal(0, 1.2, (4, 16))
    plans = [mo.plan(load, mo.uniform(2, 4, slots=3), split="equal", seed=7) for _ in range(2)]
    assert (plans[0].slots_LGC == plans[1].slots_LGC).all()


def test_scenarios() -> None:
    load = np.array([LOAD, np.array(LOAD)[:, ::-1]])
    plan = mo.plan(load, GPUS, objective=mo.Objective(risk="worst"))
    np.testing.assert_allclose(plan.time_LG.sum(1), load.mean(0).sum(1))


# --- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loads", "kwargs", "message"),
    [
        ([1, 2], {}, r"loads: has shape \(2,\), must be \[layers, experts\]"),
        ([[np.nan, 1]], {}, r"loads\[0\]\[0\]: is nan"),
        ([[-1, 1]], {}, r"loads\[0\]\[0\]: is -1.0"),
        (None, {}, "loads: must hold numbers"),
        ("absent.npz", {}, r"absent\.npz: "),
        (LOAD, {"split": "half"}, "split: is 'half'"),
        (LOAD, {"sizing": "all"}, r"sizing\.policy: is 'all'"),
        (LOAD, {"balance_tolerance": -1}, r"objective\.balance_tolerance: is -1"),
        (LOAD, {"model": "GPT-5"}, "model: 'GPT-5' is unknown"),
        (LOAD, {"model": "Phi-3.5-MoE"}, "model: Phi-3.5-MoE has 16 experts per layer, the loads have 8"),
        (LOAD, {"expert_bytes": -1}, "expert_bytes: is -1"),
        (LOAD, {"current": [[[0]]]}, r"current\.slots"),
        (LOAD, {"current": "plan.json"}, r"plan\.json: cannot be read: No such file"),
        (LOAD, {"time_limit": 0}, "time_limit: is 0, must be above 0"),
        (LOAD, {"time_limit": -1.5}, "time_limit: is -1.5"),
        (LOAD, {"seed": -1}, "seed: is -1, must be a whole number"),
        (LOAD, {"seed": 0.5}, "seed: is 0.5"),
    ],
)
def test_bad_arguments(loads: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(mo.ProblemError, match="^" + message):
        mo.plan(loads, GPUS, **kwargs)


def test_what_cannot_be_is_infeasible() -> None:
    with pytest.raises(mo.InfeasibleError, match=r"topology\.slots: 8 experts .* the GPUs have 6: 2 too few"):
        mo.plan(LOAD, mo.uniform(1, 3, slots=2))
    with pytest.raises(mo.InfeasibleError, match=r"topology\.memory: .* too few"):
        mo.plan(LOAD, mo.uniform(1, 3, memory=100), expert_bytes=30)


def test_unknown_and_unfit_solvers() -> None:
    with pytest.raises(mo.SolverUnavailableError, match="solver: 'epbl' is unknown; did you mean 'eplb'"):
        mo.plan(LOAD, GPUS, solver="epbl")
    uneven = mo.uniform(1, 4, slots=[3, 3, 3, 2])
    with pytest.raises(mo.UnsupportedFeatureError, match="'eplb' does not support GPUs of different speed"):
        mo.plan(LOAD, uneven, solver="eplb")
    with pytest.raises(mo.ProblemError, match="problem: is list, must be a Problem"):
        mo.solve(LOAD)  # type: ignore[arg-type]


def test_every_feature_that_a_solver_lacks_is_refused_by_name() -> None:
    problem = make_problem(LOAD, GPUS, limits=mo.Limits(spread=1, pinned=[(0, 0, 0)], max_replicas=3))
    with pytest.raises(mo.UnsupportedFeatureError) as caught:
        mo.solve(problem, "static")
    assert "limits on replicas" in str(caught.value)
    assert "pinned or forbidden pairs" in str(caught.value)


class Liar:
    """A solver whose plans claim what is not so."""

    name, summary, features = "liar", "lies", frozenset(Feature)

    def solve(self, problem: mo.Problem, **_: Any) -> mo.Result:
        built = Built(slots_LGC=contiguous(problem.experts, problem.capacity_LG))
        plan = finish(problem, built, solver=self.name, began=Clock.begin())
        high = plan.certificate.replace(lower_bound_L=plan.certificate.value_L * 2)
        return mo.Result(
            problem=problem, plan=plan.replace(certificate=high), status=mo.Status.OPTIMAL, solver=self.name
        )


def test_no_solver_is_believed(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "liars", SimpleNamespace(Liar=Liar))
    monkeypatch.setitem(registry.SOLVERS, "liar", "liars:Liar")
    with pytest.raises(mo.InvalidPlanError, match=r"lower bound .* is above the plan's own"):
        mo.plan(LOAD, GPUS, solver="liar")


class Nothing(Liar):
    """A solver that finds nothing."""

    def solve(self, problem: mo.Problem, **_: Any) -> mo.Result:
        return mo.Result(
            problem=problem, plan=None, status=mo.Status.NO_SOLUTION, solver="nothing", message="no idea"
        )


def test_no_plan_is_an_error_of_plan_and_a_result_of_solve(monkeypatch: Any) -> None:
    result = mo.solve(make_problem(LOAD, GPUS), Nothing())
    assert result.plan is None
    assert result.status is mo.Status.NO_SOLUTION
    monkeypatch.setitem(sys.modules, "nothings", SimpleNamespace(Nothing=Nothing))
    monkeypatch.setitem(registry.SOLVERS, "nothing", "nothings:Nothing")
    with pytest.raises(mo.InfeasibleError, match="no idea"):
        mo.plan(LOAD, GPUS, solver="nothing")


# --- comparing ---------------------------------------------------------------------------------------------


def test_comparison() -> None:
    problem = make_problem(LOAD, GPUS)
    table = mo.compare(problem, ["static", "eplb", "auto", "oracle"])
    assert (
        [row.solver for row in table.rows]
        == [*table.results, "oracle"]
        == ["static", "eplb", "auto", "oracle"]
    )
    for row in table.rows[:3]:
        plan = table.results[row.solver].plan
        assert plan is not None
        assert row.imbalance_mean == plan.imbalance_L.mean()
        assert row.imbalance_worst == plan.imbalance_L.max()
        assert row.replicas == plan.replicas
        json.dumps(row.to_dict())
    assert (table.rows[3].status, table.rows[3].imbalance_mean) == ("bound", 1.0)
    assert "a bound, not a plan" in table.rows[3].note
    with pytest.raises(mo.SolverUnavailableError, match="'oracle' is unknown"):
        mo.solve(problem, "oracle")
    assert table.rows[3].moves is None
    assert str(table).splitlines()[0].startswith("solver")
    assert repr(table) == str(table)
    assert table._repr_html_().count("<tr>") == 9  # and four of the engines' measures
    with pytest.raises(mo.SolverUnavailableError, match="'magic' is unknown"):
        mo.compare(problem, ["static", "magic"])


def test_every_solver_is_listed_with_what_it_can_take() -> None:
    names = [solver.name for solver in mo.list_solvers()]
    assert {"auto", "static", "eplb", "eplb-hierarchical", "moeless"} <= set(names)
    assert names == [name for name in mo.solver_names() if name in names]
    for solver in mo.list_solvers():
        assert mo.get_solver(solver.name).name == solver.name
        assert solver.summary
        assert solver.features <= frozenset(Feature)


def test_what_nobody_would_read_is_refused() -> None:
    problem = mo.load_instance("flashlb-equal")
    with pytest.raises(
        mo.ProblemError, match=r"groups: is of no use to solver 'eplb' whose policy is global"
    ):
        mo.solve(problem, "eplb", groups=2)
    assert mo.solve(problem, "eplb-hierarchical", groups=2).plan is not None
    with pytest.raises(mo.ProblemError, match=r"objective\.horizon: weighs moves against time, but"):
        mo.solve(problem.replace(objective=mo.Objective(horizon=10)))
    with pytest.raises(mo.ProblemError, match="engine: is 'glop', which takes no whole numbers"):
        mo.solve(problem, "milp", engine="glop")
    with pytest.raises(mo.ProblemError, match=r"engine: is 'gurobi', must be 'highs'"):
        mo.solve(problem, "milp", engine="gurobi")


def test_what_notebooks_show() -> None:
    problem = mo.load_instance("flashlb-equal").replace(name="<b>")
    result = mo.solve(problem)
    assert result.plan is not None
    live = problem.replace(current=result.plan.placement)
    shown = (problem, result, mo.compare(problem, ["static", "oracle"]), mo.pareto(live), result.plan)
    for one in shown:
        text = one._repr_html_()  # type: ignore[attr-defined]
        assert text.startswith("<table>")
        assert text.endswith("</table>")
        assert "<b>" not in text
        assert len(repr(one)) < 900
    assert repr(result).startswith("Result(auto on <b>: feasible, imbalance 1.0851, gap 8.506%")
    assert repr(mo.pareto(live)).startswith("ParetoFront(")
