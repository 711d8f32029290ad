"""``moeless-simulate``: its options, its basis, its figures."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeless_opt.runtime.simulate.cli import SWEEPS, _options, _parser, _policies, main
from moeless_opt.runtime.simulate.figures import COLOURS, FIGURES
from moeless_opt.runtime.simulate.foresight import NAMES
from moeless_opt.runtime.simulate.policies import POLICIES, Settings

DOCS = Path(__file__).resolve().parents[3] / "docs"
QUICK = ["--model", "tiny-moe", "--seconds", "3", "--quiet"]


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
    plain = _options(["--figure", "predictors"])
    assert (plain.model, plain.sizes, plain.rate) == (["tiny-moe"], "Phi-3.5-MoE", 32.0)
    other = _options(["--figure", "predictors", "--model", "Mixtral-8x7B", "--rate", "7", "--seconds", "9"])
    assert (other.model, other.sizes, other.rate) == (["Mixtral-8x7B"], "Phi-3.5-MoE", 7.0)
    assert other.seconds == 9
    assert _options([]).model is None


def test_figures_ask_for_what_there_is() -> None:
    known = set(vars(_options([])))
    for name, figure in FIGURES.items():
        changed = set(figure.options) | {key for _, changes in figure.variants for key in changes}
        assert changed <= known, name
        for policy in _policies(_options(["--figure", name]).policies):
            assert policy in COLOURS
    assert set(POLICIES) <= set(COLOURS)
    assert set(SWEEPS) <= known


@pytest.mark.parametrize("name", [name for name in FIGURES if name != "scale"])
def test_every_figure_is_run_and_drawn(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """On the tiny MoE, in seconds; a panel's lines are the rows."""
    pytest.importorskip("matplotlib")
    drawn = tmp_path / "figure.png"
    arguments = ["--figure", name, *QUICK, "--rate", "6", "--plot", str(drawn)]
    rows, said = rows_of(capsys, *arguments)
    figure = FIGURES[name]
    assert figure.text in said
    assert [row["variant"] for row in rows[:: len(rows) // max(len(figure.variants), 1)]] == [
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


def test_defaults_are_those_of_the_settings() -> None:
    options, settings = _options([]), Settings()
    for part in fields(Settings):
        assert type(getattr(settings, part.name))(getattr(options, part.name)) == getattr(settings, part.name)


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
