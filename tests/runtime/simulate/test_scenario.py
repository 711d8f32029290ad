"""Scenarios and policies from Python: what they refuse, policies of others, and figures that stay."""

from __future__ import annotations

import copy
from dataclasses import FrozenInstanceError, fields
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from moeless_opt.problems.errors import ProblemError, SolverUnavailableError
from moeless_opt.problems.spec.architecture import ModelSpec
from moeless_opt.problems.spec.topology import Topology
from moeless_opt.runtime.control.planner import Planner
from moeless_opt.runtime.simulate import policies
from moeless_opt.runtime.simulate.cli import main
from moeless_opt.runtime.simulate.options import option_of
from moeless_opt.runtime.simulate.policies import POLICIES, Policy, get_policy, list_policies, policy_names
from moeless_opt.runtime.simulate.run import simulate
from moeless_opt.runtime.simulate.scenario import Scenario, ignored
from moeless_opt.runtime.simulate.scene import scene
from moeless_opt.runtime.simulate.shares import BalancedRule, EqualRule

QUICK = Scenario(model="tiny-moe", seconds=3)
SMALL = ModelSpec(name="small", layers=2, experts=8, top_k=2, hidden=2048, ffn=1024)
REBUILT = Policy(
    name="rebuilt",
    summary="the best balance per window",
    shares=BalancedRule(),
    planner=lambda site: Planner(topology=site.topology, solver="construct"),
    colour="#7700AA",
)


def figures_of(scenario: Scenario) -> list[dict[str, Any]]:
    """Rows without the times of this machine."""
    own = ("seconds", "plan_ms", "basis")
    return [{k: v for k, v in row.items() if k not in own} for row in simulate(scenario).rows]


# ------------------------------------------------------------------------------------------- scenarios


def test_the_public_names() -> None:
    import moeless_opt.runtime.simulate as room

    assert room.Scenario is Scenario
    assert room.simulate is simulate
    for name in room.__all__:
        assert getattr(room, name) is not None
    with pytest.raises(AttributeError, match="attribute x"):
        _ = room.x


def test_every_field_has_an_option_of_its_kind() -> None:
    """The defaults pass their own checks and come out as they are, and nobody needs to say one twice."""
    for part in fields(Scenario):
        option = option_of(part)
        assert option.text
        assert option.group
        assert f"    {part.name} : {part.type}\n        {option.text}" in (Scenario.__doc__ or "")
        assert option.check(part.name, part.default) == part.default
        if option.parse is not None and isinstance(part.default, int | float | str):
            assert option.check(part.name, option.parse(str(part.default))) == part.default


def test_it_is_frozen_and_replace_validates_again() -> None:
    with pytest.raises(FrozenInstanceError):
        QUICK.seconds = 5  # type: ignore[misc]
    assert QUICK.replace(seconds=5) == Scenario(model="tiny-moe", seconds=5.0)
    assert QUICK.replace(policies="static, ours").policies == ("static", "ours")
    assert hash(QUICK.replace(seed=0)) == hash(QUICK)
    with pytest.raises(ProblemError, match=r"^every: is 0"):
        QUICK.replace(every=0)
    with pytest.raises(ProblemError, match=r"^horizon: Scenario has no such field"):
        QUICK.replace(horizon=3)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", 3),
        ("model", ""),
        ("topology", 8),
        ("gpu", 3),
        ("policies", ()),
        ("policies", 3),
        ("policies", (3,)),
        ("contention", 1),
        ("arrivals", 3),
        ("keep_alive", "long"),
        ("keep_alive", -1),
        ("keep_alive", True),
        ("seconds", float("nan")),
        ("stay", 1.5),
        ("slots", 0),
        ("slots", 2.5),
        ("seed", -1),
    ],
)
def test_errors_name_the_field(field: str, value: Any) -> None:
    with pytest.raises(ProblemError) as caught:
        Scenario(**{field: value})
    assert caught.value.where == field


MODES = {
    "seconds": {"model": SMALL},
    "writing": {"model": SMALL, "decode_every": 32, "policies": ("static", "moeless", "ours")},
    "continuous": {"model": SMALL, "batching": "continuous"},
    "closed": {"model": SMALL, "batching": "closed", "policies": ("static",), "seconds": 0.3, "rate": 30},
    "tiny": {"model": "tiny-moe", "predictor": "last"},
    "no policy per pass": {"model": SMALL, "policies": ("static", "eplb-window"), "every": 2},
    "no policy in windows": {"model": SMALL, "policies": ("moeless", "moeless-no-predictor")},
    "topology": {"model": SMALL, "topology": Topology.uniform(1, 4, slots=3)},
}
OTHER = {
    "cv": 0.9,
    "distance": 2,
    "error": 0.4,
    "decide_ms": 0.3,
    "contention": True,
    "keep_alive": 0.5,
    "tolerance": 0.6,
    "split": 400.0,
    "believed": "datasheet",
    "skew": 2.0,
    "charge_once": True,
    "gain": 0.5,
    "every": 3,
    "slots": 2,
    "spare": 2,
    "period": 0.02,
    "decode_every": 4,
    "memory": 40.0,
    "most_tokens": 300,
    "most_requests": 2,
    "stay": 0.1,
    "batch": 2.0,
    "half": "second",
    "affinity": True,
    "bank": 2,
    "predictor": "ewma",
}


@pytest.mark.parametrize("mode", list(MODES))
def test_what_is_called_idle_changes_no_figure(mode: str) -> None:
    """Put into the scenario past the checks. What is not called idle can change some."""
    base = Scenario(**{"seconds": 3, "rate": 3, **MODES[mode]})  # type: ignore[arg-type]
    values = {part.name: getattr(base, part.name) for part in fields(Scenario)}
    want = figures_of(base)
    idle = [name for name in OTHER if name in ignored({**values, name: OTHER[name]})]
    for name in idle:
        forced = copy.copy(base)
        object.__setattr__(forced, name, OTHER[name])
        assert figures_of(forced) == want, name
        with pytest.raises(ProblemError, match=f"^{name}: is set to "):
            base.replace(**{name: OTHER[name]})
    others = [name for name in OTHER if name not in idle]
    changed = [name for name in others if figures_of(base.replace(**{name: OTHER[name]})) != want]
    assert changed


def test_halves_share_no_request() -> None:
    base = Scenario(model="tiny-moe", seconds=6)
    first, second, both = (scene(base.replace(half=half)).composition for half in ("first", "second", "both"))
    assert first is not None
    assert second is not None
    assert both is not None
    assert first.requests is not None
    assert second.requests is not None
    assert both.requests is None
    assert not set(first.requests) & set(second.requests)
    assert len(first.requests) + len(second.requests) == both.traces.requests
    with pytest.raises(ProblemError, match="half: is set to 'first', but it is for token traces"):
        Scenario(half="first")
    with pytest.raises(ProblemError, match=r"half: .*affinity learns from the first half"):
        Scenario(model="Phi-3.5-MoE", traces=Path("x.npz"), predictor="affinity", half="first")


def test_a_pass_of_one_domain_is_more_uneven_and_a_longer_batch_is_larger() -> None:
    base = Scenario(model="Phi-3.5-MoE", seconds=12, policies=("static",))
    mixed, alone, longer = (
        simulate(base.replace(**change)).rows[0] for change in ({"stay": 0.0}, {"stay": 1.0}, {"batch": 4.0})
    )
    assert alone["imbalance"] > 1.03 * mixed["imbalance"]
    assert longer["mean_ms"] > 2 * mixed["mean_ms"]


def test_model_and_topology_of_ones_own() -> None:
    model = ModelSpec(name="mine", layers=2, experts=8, top_k=2, hidden=64, ffn=128)
    topology = Topology.uniform(1, 4, slots=3)
    scenario = Scenario(model=model, topology=topology, seconds=3, policies=("static", "ours"))
    found = simulate(scenario)
    assert "mine: 2 layers x 8 experts" in found.text[0]
    assert "up to 3 replicas" in found.text[0]
    assert found.rows[0]["held"] == 16
    assert len(found.rows[1]["foreseen_L"] or ()) == 2
    with pytest.raises(ProblemError, match=r"^slots: .*the topology has slots or memory of its own"):
        scenario.replace(slots=2)


def test_a_result_prints_draws_and_repeats_itself(tmp_path: Path) -> None:
    told: list[tuple[str, float, float]] = []
    said: list[str] = []
    scenario = QUICK.replace(policies=("static", "oracle"))
    found = simulate(scenario, say=said.append, progress=lambda *report: told.append(report))
    assert said == found.notes()
    assert {name for name, _, _ in told} == {"static", "oracle"}
    assert all(now >= 0 for _, now, _ in told)
    text = str(found)
    for part in ("measured: ", "assumed: ", "settings: cv 0.2", "vs static", "vs oracle", "-------"):
        assert part in text
    assert "vs eplb" not in text
    assert figures_of(found.scenario) == figures_of(QUICK.replace(policies=("static", "oracle")))
    pytest.importorskip("matplotlib")
    found.plot(tmp_path / "latency.png")
    assert (tmp_path / "latency.png").read_bytes().startswith(b"\x89PNG")


GOLDEN: dict[str, tuple[Scenario, dict[str, tuple[float, ...]]]] = {
    "reading": (
        Scenario(model="Mixtral-8x7B", seconds=6, every=2, policies=tuple(POLICIES)),
        {
            "static": (7.75413349, 18.1723484, 2.47140203, 256, 0, 174.772952),
            "eplb": (6.22409919, 18.1723484, 1.77334526, 412.14908, 368, 210.917861),
            "oracle": (3.5136222, 5.74449594, 1, 256, 0, 83.0753234),
            "oracle-placed": (3.96482471, 6.30719023, 1.14269023, 256, 0, 92.8276307),
            "moeless": (5.27019859, 10.3638441, 1.40391756, 494.546649, 93.5, 28.9948345),
            "moeless-no-predictor": (6.56780324, 18.1723484, 1.92380897, 428.813579, 83.8333333, 34.9209849),
            "moeless-no-scaler": (7.75413349, 18.1723484, 2.47140203, 256, 0, 39.0002088),
            "moeless-no-placer": (8.15730175, 19.8806721, 2.40015571, 637.563218, 323, 41.8094825),
            "stay": (6.65230193, 18.1723484, 2.07138531, 337.192072, 21.8333333, 34.0977365),
            "ours-windowed": (6.44975944, 18.1723484, 1.99252842, 354.815861, 41.8333333, 33.2243577),
            "moeless-waits": (6.59775997, 13.3052084, 1.24968249, 495.496955, 93.5, 36.5052311),
            "moeless-warm": (5.69731388, 10.5577587, 1.55961801, 495.703402, 93.5, 30.9998328),
            "ours-waits": (5.12200542, 7.37308586, 1.44716383, 428.3157, 44.6666667, 27.1655194),
            "ours-warm": (5.29270818, 10.2112434, 1.57367617, 430.532125, 44.6666667, 27.9113429),
            "eplb-window": (7.11005089, 18.1723484, 2.10981676, 403.609672, 189, 235.129932),
            "eplb-live": (5.72557662, 18.1723484, 1.68376853, 405.863786, 368, 30.2782741),
            "moeless-within": (5.47366995, 9.64934377, 1.47618957, 502.077714, 120.166667, 29.8981274),
            "ours": (5.00238259, 7.85076878, 1.46092488, 430.131124, 44.5, 26.6058798),
        },
    ),
    "writing": (
        Scenario(
            model="Phi-3.5-MoE",
            seconds=3,
            decode_every=64,
            contention=True,
            decide_ms=0.5,
            policies=("static", "moeless", "ours"),
        ),
        {
            "static": (0.390215379, 0.577823127, 2.44720157, 512, 0, 1657.98207),
            "moeless": (0.490479658, 0.868747032, 2.05817374, 812.247641, 57.1652452, 440.422044),
            "ours": (0.384739805, 0.577823127, 1.78989283, 652.514946, 0.277185501, 362.54988),
        },
    ),
    "closed": (
        Scenario(
            model="Mixtral-8x7B",
            seconds=2,
            batching="closed",
            most_requests=16,
            policies=("static", "ours-windowed"),
        ),
        {
            "static": (0.684072996, 1.97565859, 2.79008032, 256, 0, 1275.40453),
            "ours-windowed": (0.680354924, 1.77329983, 2.52289106, 418.644938, 0.450704225, 266.647099),
        },
    ),
    "recorded": (
        Scenario(
            model="tiny-moe",
            seconds=5,
            sizes="Phi-3.5-MoE",
            rate=12,
            predictor="recorded",
            keep_alive="adaptive",
            policies=("static", "moeless", "ours"),
        ),
        {
            "static": (3.7759558, 5.18165346, 2.23087339, 96, 0, 2.36692397),
            "moeless": (2.84650047, 4.63028487, 1.42012789, 141.772622, 25.2, 0.683875637),
            "ours": (2.66363786, 4.17439927, 1.40214177, 116.021959, 10.6, 0.587717012),
        },
    ),
}
"""Mean and 99th percentile in ms, imbalance, replicas held and moved per pass, cost by use in GB*s."""


@pytest.mark.parametrize("name", list(GOLDEN))
def test_figures_stay(name: str) -> None:
    """Of every policy; with writing passes, contention and deciding; in the closed loop; by real gates."""
    scenario, wanted = GOLDEN[name]
    found = {
        row["policy"]: (
            row["mean_ms"],
            row["p99_ms"],
            row["imbalance"],
            row["held"],
            row["moved_per_pass"],
            row["cost"]["functions"],
        )
        for row in simulate(scenario).rows
    }
    assert set(found) == set(wanted)
    for policy, figures in wanted.items():
        assert found[policy] == pytest.approx(figures, rel=1e-6), policy


@pytest.mark.parametrize("more", [{"decode_every": 16}, {"batching": "continuous", "affinity": True}])
def test_the_largest_cache_is_that_of_the_traffic(more: dict[str, Any]) -> None:
    here = scene(Scenario(seconds=3, rate=4.0, **more))
    tokens = max(float(passes.kv_tokens_B.max()) for passes in here.traffic())
    cache = tokens * here.machine.kv_token_bytes / here.topology.gpus
    assert here.experts_room() == pytest.approx(here.room - cache)
    assert cache > 0


def test_waits_of_passes_that_stand_for_many_count_as_often() -> None:
    """Deciding takes far longer than a layer, which hides next to nothing of it."""
    scenario = Scenario(model=SMALL, seconds=2, decode_every=64, decide_ms=50, policies=("moeless-waits",))
    assert 45 < simulate(scenario).rows[0]["wait_ms"] < 51


def test_replicas_change_within_the_memory_or_not_at_all() -> None:
    scenario = Scenario(model="Llama-4-Scout", seconds=6, rate=40.0, policies=("static", "eplb", "ours"))
    free = simulate(scenario.replace(memory=100.0, spare=0))
    tight = simulate(scenario)
    full = simulate(scenario.replace(memory=43.9))
    assert all(row["peak_GB"] > tight.rows[0]["room_GB"] for row in free.rows[1:]), "or nothing is tight"
    assert all(row["peak_GB"] <= row["room_GB"] for found in (free, tight, full) for row in found.rows)
    for policy in (1, 2):
        assert tight.rows[policy]["moved_per_pass"] > 0
        assert tight.rows[policy]["refused"] == 0
        # Room for less than one replica more: nothing can change places.
        assert full.rows[policy]["moved_per_pass"] == 0
        assert full.rows[policy]["peak_GB"] == full.rows[0]["peak_GB"]
        assert full.rows[policy]["mean_ms"] == pytest.approx(full.rows[0]["mean_ms"])
    assert tight.rows[2]["mean_ms"] < 0.85 * tight.rows[0]["mean_ms"]
    refused = full.rows[1]["refused"]
    last = full.table().splitlines()[-1]
    assert last == f"plans not carried out, because replicas could not change: eplb {refused}"
    assert refused > 1
    assert "not carried out" not in tight.table()


# -------------------------------------------------------------------------------------------- policies


def test_a_policy_of_ones_own_runs_beside_ours(tmp_path: Path) -> None:
    scenario = QUICK.replace(policies=("static", REBUILT), every=2, seconds=6)
    found = simulate(scenario)
    assert [row["policy"] for row in found.rows] == ["static", "rebuilt"]
    assert found.rows[1]["moved_per_pass"] > 0
    assert found.rows[1]["imbalance"] < found.rows[0]["imbalance"]
    pytest.importorskip("matplotlib")
    found.plot(tmp_path / "latency.svg")
    assert "#7700aa" in (tmp_path / "latency.svg").read_text().lower()


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"name": ""}, "policy.name"),
        ({"shares": "equal"}, "policy.shares"),
        ({"transfers": "per-pass"}, "policy.transfers"),
        ({"planner": 3}, "policy.planner"),
        ({"part": "hero"}, "policy.part"),
        ({"colour": None}, "policy.colour"),
    ],
)
def test_a_policy_is_checked(change: dict[str, Any], where: str) -> None:
    parts: dict[str, Any] = {"name": "x", "summary": "y", "shares": EqualRule(), **change}
    with pytest.raises(ProblemError) as caught:
        Policy(**parts)
    assert caught.value.where == where


def broken() -> Policy:
    raise RuntimeError("no licence")


def plug(monkeypatch: pytest.MonkeyPatch, **targets: str) -> None:
    """Entry points of other packages."""
    entries = [EntryPoint(name, value, policies.ENTRY_POINTS) for name, value in targets.items()]
    monkeypatch.setattr(policies, "entry_points", lambda group: entries)


def test_policies_of_others_come_by_entry_point(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A broken one is a warning and a row; asked for, one line; the others go on."""
    import sys

    monkeypatch.setitem(sys.modules, "others", sys.modules[__name__])
    plug(
        monkeypatch,
        rebuilt="others:REBUILT",
        missing="no_such_package:policy",
        broken="others:broken",
        odd="others:QUICK",
        renamed="others:REBUILT",
        static="others:REBUILT",
    )
    assert policy_names() == [*POLICIES, "broken", "missing", "odd", "rebuilt", "renamed"]
    assert get_policy("rebuilt") is REBUILT
    assert get_policy("static") is POLICIES["static"]
    reasons = {"missing": "No module named 'no_such_package'", "broken": "RuntimeError: no licence"}
    reasons |= {"odd": "TypeError", "renamed": "calls itself 'rebuilt'"}
    for name, why in reasons.items():
        with pytest.raises(SolverUnavailableError, match=why):
            get_policy(name)
        assert main(["--policies", f"static,{name}", "--quiet"]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert why in said
    with pytest.warns(UserWarning, match="cannot be used") as warned:
        rows = list_policies()
    assert len(warned) == len(reasons)
    assert {name for name, row in rows.items() if isinstance(row, str)} == set(reasons)
    with pytest.warns(UserWarning, match="cannot be used"):
        assert main(["--list-policies"]) == 0
    table = capsys.readouterr().out
    assert "the best balance per window" in table
    assert "cannot be used: RuntimeError: no licence" in table
    arguments = ["--model", "tiny-moe", "--seconds", "3", "--policies", "static,rebuilt", "--quiet"]
    assert main(arguments) == 0
    assert "rebuilt" in capsys.readouterr().out
