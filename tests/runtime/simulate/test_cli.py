"""``moeless-simulate``: its options, its basis, its figures."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeless_opt.runtime.simulate.cli import _parser, _scenarios, main
from moeless_opt.runtime.simulate.figures import FIGURES, PAPER_MODELS
from moeless_opt.runtime.simulate.foresight import NAMES
from moeless_opt.runtime.simulate.options import option_of
from moeless_opt.runtime.simulate.policies import POLICIES
from moeless_opt.runtime.simulate.scenario import Scenario

DOCS = Path(__file__).resolve().parents[3] / "docs"
QUICK = ["--model", "tiny-moe", "--seconds", "3", "--quiet"]


def scenarios(*arguments: str) -> list[Scenario]:
    return [scenario for _, scenario in _scenarios(_parser().parse_args(arguments))]


def rows_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[list[dict[str, Any]], str]:
    assert main([*arguments, "--json"]) == 0
    said = capsys.readouterr()
    return json.loads(said.out), said.err


def test_every_option_is_told() -> None:
    page = DOCS / "cli.md"
    if not page.is_file():
        pytest.skip("the documentation is not here")
    _, _, text = page.read_text(encoding="utf-8").partition("moeless-simulate")
    for action in _parser()._actions:
        for option in action.option_strings:
            if option not in ("-h", "--help"):
                assert f"`{option}" in text, f"docs/cli.md does not tell of moeless-simulate's {option}"
    for name in (*NAMES, *FIGURES):
        assert f"`{name}`" in text, f"docs/cli.md does not tell of {name}"


def test_tiny_moe_and_recorded_predictions_out_of_the_box(capsys: pytest.CaptureFixture[str]) -> None:
    rows, said = rows_of(capsys, *QUICK, "--predictor", "recorded", "--policies", "static,moeless,ours")
    assert [row["policy"] for row in rows] == ["static", "moeless", "ours"]
    assert rows[0]["foreseen"] is None
    assert 0 < rows[1]["foreseen_ahead"] < 0.1
    assert len(rows[1]["foreseen_L"]) == 6
    assert rows[1]["foreseen"] == rows[2]["foreseen"]
    assert "measured: routing of every token" in said
    assert "predictions: trained gates" in said
    assert "tiny_moe_foresight.npz" in said


@pytest.mark.parametrize("name", list(NAMES))
def test_every_predictor_says_what_it_rests_on(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*QUICK, "--predictor", name, "--policies", "moeless"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if "predictions: " in line]
    kind = {"assumed": "assumed", "gate": "measured", "recorded": "measured"}.get(name, "computed")
    assert line.startswith(f"{kind}: ")
    for part in ("measured", "composed", "assumed"):
        assert any(text.startswith(f"{part}: ") for text in lines)


def test_predictors_that_need_tokens_say_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    quick = ["--model", "Phi-3.5-MoE", "--seconds", "2", "--policies", "moeless", "--quiet"]
    assert main([*quick, "--predictor", "affinity"]) == 2
    assert "token traces" in capsys.readouterr().err
    assert main([*quick, "--predictions", str(tmp_path / "none.npz")]) == 2
    assert "none.npz" in capsys.readouterr().err
    assert main(["--figure", "gpt-oss", "--quiet"]) == 2
    assert "--traces" in capsys.readouterr().err


def test_affinity_learns_on_requests_that_the_traffic_leaves_out(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Four experts always go together, in all layers, so transitions tell all."""
    group = np.random.default_rng(0).integers(0, 8, 600)
    experts = (4 * group[:, None, None] + np.arange(4)).repeat(24, axis=1)
    np.savez(tmp_path / "t.npz", experts=experts.astype(np.uint8), offsets=np.arange(0, 601, 30))
    arguments = ("--model", "gpt-oss-20b", "--traces", str(tmp_path / "t.npz"), "--seconds", "6", "--quiet")
    rows, said = rows_of(capsys, *arguments, "--predictor", "affinity", "--policies", "moeless")
    assert "learnt on 10 requests that the traffic leaves out" in said
    assert max(rows[0]["foreseen_L"][1:]) < 0.2 * rows[0]["foreseen_L"][0]


def test_sizes_scale_the_weights(capsys: pytest.CaptureFixture[str]) -> None:
    small, _ = rows_of(capsys, *QUICK, "--policies", "static")
    large, said = rows_of(capsys, *QUICK, "--policies", "static", "--sizes", "Phi-3.5-MoE")
    assert large[0]["mean_ms"] > 10 * small[0]["mean_ms"]
    assert "6 layers x 16 experts, top 2, 157.3 MB each" in said


def test_a_rate_makes_arrivals(capsys: pytest.CaptureFixture[str]) -> None:
    rows_of(capsys, *QUICK, "--rate", "40", "--policies", "static")
    _, said = rows_of(capsys, *QUICK, "--rate", "40", "--policies", "static", "--stay", "0")
    assert "arrivals: Poisson, 40 per second" in said
    assert "forerunner" not in said


# ------------------------------------------------------------------------------------------- figures


def test_a_figure_gives_way_to_the_command_line() -> None:
    plain = scenarios("--figure", "predictors")[0]
    assert (plain.model, plain.sizes, plain.rate) == ("tiny-moe", "Phi-3.5-MoE", 32.0)
    assert plain.seconds == 150
    given = ("--model", "Mixtral-8x7B", "--rate", "7", "--seconds", "9")
    other = scenarios("--figure", "error", *given)[0]
    assert (other.model, other.rate, other.seconds) == ("Mixtral-8x7B", 7.0, 9.0)
    assert [each.model for each in scenarios("--figure", "cost")] == list(PAPER_MODELS)
    assert [each.model for each in scenarios()] == list(PAPER_MODELS)


def test_what_a_figure_would_leave_idle_gives_way(tmp_path: Path) -> None:
    """Recorded arrivals make the figure's rate idle; another model its traces."""
    (found, *_) = scenarios("--figure", "predictors", "--arrivals", str(tmp_path / "a.csv"))
    assert found.rate is None
    assert scenarios("--figure", "gpt-oss")[0].traces == Path("gptoss20b_topk.npz")
    assert scenarios("--figure", "gpt-oss", "--model", "tiny-moe")[0].traces is None
    assert scenarios("--figure", "gpt-oss", "--model", "gpt-oss-20b")[0].traces is not None


def test_figures_are_scenarios() -> None:
    for name, figure in FIGURES.items():
        assert len(scenarios("--figure", name)) == max(len(figure.variants), 1) * max(len(figure.models), 1)
    looks = {(policy.colour, policy.marker) for policy in POLICIES.values()}
    assert len(looks) == len(POLICIES)


def test_the_command_line_is_made_from_the_fields() -> None:
    """Every field is an option that says its default, and parses what it says into an equal scenario."""
    told = {action.dest: action for action in _parser()._actions}
    for part in fields(Scenario):
        option, action = option_of(part), told[part.name]
        assert option.text in (action.help or "").replace("%%", "%")
        if option.parse is None:
            continue
        shown = option.shown
        if shown is None and part.default is not None and part.name != "model":
            assert (
                f"default {part.default:g}"
                if isinstance(part.default, float)
                else str(part.default) in (action.help or "")
            )
    assert scenarios("--model", "Phi-3.5-MoE")[0] == Scenario()
    changed = scenarios("--model", "tiny-moe", "--keep-alive", "adaptive", "--every", "3", "--contention")[0]
    assert changed == Scenario(model="tiny-moe", keep_alive="adaptive", every=3, contention=True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--gpu H20", "--gpu: 'H20' is unknown; did you mean 'H200'? "),
        ("--gpu H200 --topology 4x8xH100", "--gpu: is 'H200', but the topology '4x8xH100' is of H100"),
        ("--timed 64x32", "--timed: is set to (64, 32), but no timings are given"),
        ("--model Mixtrl-8x7B", "--model: 'Mixtrl-8x7B' is unknown; did you mean 'Mixtral-8x7B'? "),
        ("--sizes x", "--sizes: 'x' is unknown; "),
        ("--topology 8xA600", "--topology: '8xA600' is unknown; did you mean '8xA6000'? "),
        ("--topology 4x8xX9", "--topology: '4x8xX9' is unknown; "),
        ("--topology 0x8", "--topology: '0x8' is unknown; "),
        ("--policies statc,eplb", "--policies: 'statc' is unknown; did you mean 'static'? "),
        ("--policies static,static", "--policies: has 'static' twice"),
        ("--policies ,", "--policies: names no policy"),
        ("--batching clsed", "--batching: 'clsed' is unknown; did you mean 'closed'? "),
        ("--predictor x", "--predictor: 'x' is unknown; "),
        ("--figure x", "--figure: 'x' is unknown; "),
        ("--sweep x 1", "--sweep: 'x' is unknown; "),
        ("--sweep cv", "--sweep: needs at least one value for cv"),
        ("--sweep cv low", "--sweep: 'low' is no value for cv"),
        ("--sweep gpu H20", "--gpu: 'H20' is unknown; "),
        ("--rate fast", "arguments: argument --rate: invalid float value: 'fast'"),
        ("--rate -1", "--rate: is -1.0, must be a finite number above 0"),
        ("--every 0", "--every: is 0, must be a whole number of at least 1"),
        ("--error 2", "--error: is 2.0, must be from 0 to 1"),
        ("--keep-alive long", "arguments: argument --keep-alive: invalid"),
        ("--period 0.1", "--period: is set to 0.1, but passes follow from batching 'seconds'"),
        (
            "--batching closed --decode-every 4",
            "--decode-every: is set to 4, but it is for batching 'seconds'",
        ),
        (
            "--batching continuous --most-tokens 9",
            "--most-tokens: is set to 9, but it is for batching 'closed'",
        ),
        ("--bank 4", "--bank: is set to 4, but it is for batching 'continuous'"),
        ("--model tiny-moe --affinity", "--affinity: is set to True, but it is for generated routing"),
        ("--model tiny-moe --lengths l.csv", "--lengths: is set to l.csv, but recorded texts are as long"),
        ("--slots 3 --spare 2", "--spare: is set to 2, but slots say how many there are"),
        ("--rate 3 --arrivals a.csv", "--rate: is set to 3.0, but arrivals are read from a file"),
        ("--predictor last --error 0.2", "--error: is set to 0.2, but predictor is 'last'"),
        ("--policies static,ours --cv 0.4", "--cv: is set to 0.4, but no policy of static, ours reads it"),
        ("--policies static,eplb --distance 2", "--distance: is set to 2, but no policy of static, eplb"),
        ("--policies static --contention", "--contention: is set to True, but no policy of static reads it"),
        ("--policies moeless-no-predictor --predictor ar", "--predictor: is set to 'ar', but no policy of"),
        ("--seconds 0", "--seconds: is 0, all of a recording; arrivals that are drawn need a number"),
        ("--batching continuous --seconds 0.1", "--seconds: is 0.1, which is too short for a single pass"),
        ("--popularity none.npz", "none.npz"),
    ],
)
def test_what_cannot_be_is_one_line(arguments: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments.split(), "--quiet"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("moeless-simulate: ")
    assert said in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize("name", [name for name in FIGURES if name != "scale"])
def test_every_figure_is_run_and_drawn(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """On the tiny MoE, in seconds; a panel's lines are the rows."""
    pytest.importorskip("matplotlib")
    drawn = tmp_path / "figure.png"
    arguments = ["--figure", name, *QUICK, "--rate", "6", "--plot", str(drawn)]
    rows, said = rows_of(capsys, *arguments)
    figure = FIGURES[name]
    assert figure.text in said
    assert list(dict.fromkeys(row["variant"] for row in rows)) == [
        label for label, _ in figure.variants or [("", {})]
    ]
    assert drawn.read_bytes().startswith(b"\x89PNG")
    assert drawn.stat().st_size < 100_000
    for row in rows:
        quantiles = np.array(row["quantiles_ms"])
        assert (np.diff(quantiles) >= 0).all()
        assert quantiles[0] <= row["mean_ms"] <= quantiles[-1]
        assert row["p99_ms"] == pytest.approx(float(np.interp(198, np.arange(201), quantiles)), rel=1e-4)


def test_scale_keeps_the_traffic_per_gpu() -> None:
    variants = FIGURES["scale"].variants
    assert (variants[0][0], variants[-1][0]) == ("32", "2048")
    for label, changes in variants:
        nodes, per_node = map(int, changes["topology"].split("x"))
        assert nodes * per_node == int(label)
        assert changes["rate"] / int(label) == variants[0][1]["rate"] / 32
        assert changes["slots"] * int(label) >= 256


def test_missing_extras_are_told_before_the_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("moeless_opt.solvers.pack.fast.available", lambda: False)
    assert main([*QUICK, "--policies", "static,stay"]) == 0
    assert "moeless-opt[fast]" in capsys.readouterr().err
    assert main([*QUICK, "--policies", "static"]) == 0
    assert "moeless-opt[fast]" not in capsys.readouterr().err
    monkeypatch.setattr("moeless_opt.plots.find_spec", lambda name: None)
    assert main([*QUICK, "--policies", "static", "--plot", str(tmp_path / "x.png")]) != 0
    assert "moeless-opt[plot]" in capsys.readouterr().err
