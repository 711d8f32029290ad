"""Predictors in the simulator: against loops, and recorded predictions against counting."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moeless_opt.problems.errors import FormatError, ProblemError
from moeless_opt.problems.io.arrivals import poisson_arrivals
from moeless_opt.problems.io.traces import TokenTraces
from moeless_opt.runtime.predict.affinity import Affinity
from moeless_opt.runtime.predict.history import AutoRegressive, LastWindow
from moeless_opt.runtime.predict.measures import load_distance
from moeless_opt.runtime.predict.predictor import Context
from moeless_opt.runtime.simulate.compose import compose_steps, draw_requests
from moeless_opt.runtime.simulate.foresight import (
    NAMES,
    TINY_MOE,
    Assumed,
    Composition,
    JudgedForeseer,
    Online,
    Predictions,
    Recorded,
    foreseer,
    read_predictions,
    tiny_moe_predictions_file,
)
from moeless_opt.runtime.simulate.traffic import Passes, from_traces

LAYERS, EXPERTS, TOP_K, FURTHEST = 4, 6, 2, 3
ARRIVALS = poisson_arrivals(3, 20, prompt=5, output=5, seed=1)


def traces_of(seed: int, requests: int = 12) -> TokenTraces:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(2, 9, requests)
    offsets = np.concatenate([[0], np.cumsum(tokens)])
    experts = np.argsort(rng.random((offsets[-1], LAYERS, EXPERTS)), axis=2)[:, :, :TOP_K]
    return TokenTraces(
        experts_TLK=experts.astype(np.uint8),
        offsets=offsets,
        experts=EXPERTS,
        domain=np.arange(requests) % 3,
        domains=("a", "b", "c"),
    )


def predictions_of(seed: int) -> Predictions:
    """Gates that are right with a chance, in both forms."""
    traces, rng = traces_of(seed), np.random.default_rng(seed + 1)
    tokens = len(traces.experts_TLK)
    right = np.repeat(traces.experts_TLK[:, :, None], FURTHEST, axis=2)
    wrong = rng.permuted(right, axis=0)
    chosen = np.where(rng.random((tokens, LAYERS, FURTHEST, 1)) < 0.7, right, wrong)
    chance = rng.integers(0, 5, (tokens, LAYERS, FURTHEST, EXPERTS)).astype(np.uint8)
    return Predictions(traces=traces, said={"chosen_gate": chosen, "chance_tuned": chance}, unit=0.25)


# --------------------------------------------------------------------------------------- composition


@pytest.mark.parametrize("batching", ["seconds", "continuous"])
def test_composed_passes_are_the_slow_loop(batching: str) -> None:
    traces = traces_of(3)
    composition = Composition(
        traces=traces, arrivals=ARRIVALS, batching=batching, period=0.5, window=4, seed=7
    )
    drawn = np.random.default_rng(7).integers(0, traces.requests, ARRIVALS.requests)
    want: dict[float, np.ndarray] = {}
    for time, request in zip(ARRIVALS.time_R, drawn, strict=True):
        for i, routed in enumerate(traces.request(int(request))):
            at = np.floor(time) + 1 if batching == "seconds" else (np.ceil(time / 0.5 - 1e-9) + i) * 0.5
            load = want.setdefault(float(at), np.zeros((LAYERS, EXPERTS)))
            for layer in range(LAYERS):
                load[layer, routed[layer]] += 1
    seen = 0
    for passes in composition.passes():
        for at, load in zip(passes.start_B, passes.load_BLE, strict=True):
            assert np.array_equal(load, want.get(float(at), np.zeros((LAYERS, EXPERTS))))
            seen += int(load[0].sum())
        assert np.array_equal(passes.tokens_B * TOP_K, passes.load_BLE[:, 0].sum(1))
        assert passes.prefill_B.all() == (batching == "seconds")
    if batching == "seconds":
        assert seen == sum(load[0].sum() for load in want.values())
    else:
        assert seen > 0.8 * sum(load[0].sum() for load in want.values())


def test_continuous_composition_is_that_of_the_traces() -> None:
    traces = traces_of(4)
    composition = Composition(
        traces=traces, arrivals=ARRIVALS, batching="continuous", period=0.1, window=8, seed=2
    )
    other = from_traces(traces, ARRIVALS, period=0.1, window=8, seed=2)
    steps = compose_steps(traces, ARRIVALS, step_seconds=0.1, window=8, seed=2)
    count = 0
    for a, b, c in zip(composition.passes(), other, steps, strict=True):
        assert np.array_equal(a.load_BLE, b.load_BLE)
        assert np.array_equal(a.load_BLE, c.load_SLE)
        assert np.allclose(a.start_B, b.start_B)
        assert np.allclose(a.kv_tokens_B, b.kv_tokens_B)
        count += a.count
    assert count > 100


def test_requests_keep_to_their_domain() -> None:
    traces = traces_of(5, requests=30)
    arrivals = poisson_arrivals(50, 60, seed=1)

    drawn = draw_requests(traces, arrivals, stay=0.9, seed=3)
    assert traces.domain is not None
    kind = traces.domain[drawn]
    same = float((kind[1:] == kind[:-1]).mean())
    assert same == pytest.approx(0.9 + 0.1 / 3, abs=0.02)
    assert np.bincount(kind) / kind.size == pytest.approx(np.full(3, 1 / 3), abs=0.1)
    assert set(drawn.tolist()) == set(range(30))
    few = draw_requests(traces, arrivals, requests=np.array([1, 2, 5]), stay=0.5, seed=3)
    assert set(few.tolist()) == {1, 2, 5}
    with pytest.raises(ProblemError, match="domain"):
        draw_requests(traces.replace(domain=None), arrivals, stay=0.5)


# ---------------------------------------------------------------------------------------- predictors


@pytest.mark.parametrize("distance", [1, 2, 3, 9])
def test_online_is_the_loop(distance: int) -> None:
    """At each layer the loads of that layer are known, of later ones nothing."""
    traces = traces_of(6)
    affinity = Affinity(LAYERS, EXPERTS, furthest=FURTHEST).learn(traces.experts_TLK)
    composition = Composition(traces=traces, arrivals=ARRIVALS)
    ahead = Online(affinity, distance)
    first = AutoRegressive()
    for passes in composition.passes():
        got = ahead(passes)
        for load_LE, foreseen_LE in zip(passes.load_BLE, got, strict=True):
            for layer in range(LAYERS):
                if layer < distance:
                    want_E = first.predict(Context(layer=layer, load_E=load_LE[layer]), 0)
                else:
                    known = Context(layer=layer - distance, load_E=load_LE[layer - distance])
                    want_E = affinity.predict(known, distance)
                assert np.allclose(foreseen_LE[layer], want_E)
            assert np.allclose(foreseen_LE.sum(1), load_LE.sum(1))
            first.observe(load_LE)


def test_the_future_is_not_looked_at() -> None:
    """Loads of later layers and later passes change nothing of what is foreseen."""
    composition = Composition(traces=traces_of(8), arrivals=ARRIVALS)
    all_passes = list(composition.passes())
    changed = [
        Passes(
            start_B=p.start_B,
            weight_B=p.weight_B,
            tokens_B=p.tokens_B,
            kv_tokens_B=p.kv_tokens_B,
            prefill_B=p.prefill_B,
            load_BLE=p.load_BLE if i < 5 else p.load_BLE[:, :, ::-1],
        )
        for i, p in enumerate(all_passes)
    ]
    for predictor in (LastWindow(), AutoRegressive()):
        one, other = Online(predictor, 1), Online(type(predictor)(), 1)
        for i, (a, b) in enumerate(zip(all_passes[:6], changed[:6], strict=True)):
            x, y = one(a), other(b)
            assert np.allclose(x, y), i  # also of the sixth pass: its own loads are not known


def test_assumed_errs_as_much_as_it_says() -> None:
    composition = Composition(traces=traces_of(9), arrivals=ARRIVALS)
    exact, rough = JudgedForeseer(Assumed(0.0)), JudgedForeseer(Assumed(0.5, seed=1))
    for passes in composition.passes():
        assert np.array_equal(exact(passes), passes.load_BLE)
        assert np.allclose(rough(passes).sum(2), passes.load_BLE.sum(2), atol=1)
    assert not exact.distance_L.any()
    assert (rough.distance_L > 0.05).all()
    assert (rough.distance_L < 0.5).all()


def test_judged_is_the_mean_distance() -> None:
    composition = Composition(traces=traces_of(9), arrivals=ARRIVALS, batching="continuous", window=4)
    judged, plain = JudgedForeseer(Online(LastWindow(), 1)), Online(LastWindow(), 1)
    found = []
    for passes in composition.passes():
        judged(passes)
        for foreseen, actual in zip(plain(passes), passes.load_BLE, strict=True):
            if actual.any():
                found.append([load_distance(foreseen[i], actual[i]) for i in range(LAYERS)])
    assert np.allclose(judged.distance_L, np.mean(found, axis=0))
    assert judged.text == plain.text


# ---------------------------------------------------------------------------------------- recordings


@pytest.mark.parametrize("batching", ["seconds", "continuous"])
@pytest.mark.parametrize(("kind", "distance"), [("gate", 1), ("gate", 3), ("tuned", 2)])
def test_recorded_predictions_are_counted_token_by_token(batching: str, kind: str, distance: int) -> None:
    predictions = predictions_of(10)
    composition = Composition(
        traces=predictions.traces, arrivals=ARRIVALS, batching=batching, stay=0.6, window=4, seed=5
    )
    recorded = Recorded(predictions, composition.tokens(), kind, distance)
    for item, passes in zip(composition.tokens(), composition.passes(), strict=True):
        got = recorded(passes)
        want = np.zeros_like(got)
        for token, step in zip(item.token_P, item.step_P, strict=True):
            for layer in range(distance, LAYERS):
                if kind == "gate":
                    np.add.at(
                        want[step, layer], predictions.said["chosen_gate"][token, layer, distance - 1], 1
                    )
                else:
                    want[step, layer] += 0.25 * predictions.said["chance_tuned"][token, layer, distance - 1]
        total = want.sum(2, keepdims=True)
        want *= passes.load_BLE.sum(2, keepdims=True) / np.where(total > 0, total, 1)
        assert np.allclose(got[:, distance:], want[:, distance:])
        assert np.allclose(got.sum(2), passes.load_BLE.sum(2))


def test_passes_must_be_those_that_were_composed() -> None:
    predictions = predictions_of(11)
    composition = Composition(traces=predictions.traces, arrivals=ARRIVALS, batching="continuous", window=4)
    recorded = Recorded(predictions, composition.tokens(), "gate", 1)
    (first, *_) = composition.passes()
    with pytest.raises(ProblemError, match="passes"):
        recorded(first.part(0, 2))


def test_a_file_of_predictions(tmp_path: Path) -> None:
    made = predictions_of(12)
    np.savez(
        tmp_path / "p.npz",
        experts=made.traces.experts_TLK,
        offsets=made.traces.offsets,
        unit=made.unit,
        transitions=np.ones((FURTHEST, LAYERS, EXPERTS, EXPERTS)),
        **made.said,
    )
    read = read_predictions(tmp_path / "p.npz", experts=EXPERTS)
    assert read.kinds == ("gate", "tuned")
    assert read.unit == 0.25
    assert all(np.array_equal(read.said[name], made.said[name]) for name in made.said)
    assert read.transitions_DLEE is not None
    np.savez(tmp_path / "q.npz", experts=made.traces.experts_TLK, offsets=made.traces.offsets)
    with pytest.raises(FormatError, match="no predictions"):
        read_predictions(tmp_path / "q.npz")
    bad = made.said["chosen_gate"][:-1]
    with pytest.raises(ProblemError, match="chosen_gate"):
        made.replace(said={"chosen_gate": bad})
    item = next(Composition(traces=made.traces, arrivals=ARRIVALS).tokens())
    with pytest.raises(ProblemError, match="hold no 'other'"):
        made.load_SLE("other", 1, item)
    with pytest.raises(ProblemError, match="recorded are 1 to 3"):
        made.load_SLE("gate", 4, item)


def test_every_name_makes_a_foreseer_or_says_what_it_needs() -> None:
    predictions = predictions_of(13)
    composition = Composition(traces=predictions.traces, arrivals=ARRIVALS)
    for name in NAMES:
        one = foreseer(
            name,
            error=0.1,
            distance=1,
            composition=composition,
            predictions=predictions,
            learnt=np.arange(4),
        )
        kind = one.text.partition(":")[0]
        assert kind == {"assumed": "assumed", "gate": "measured", "recorded": "measured"}.get(
            name, "computed"
        )
        for passes in composition.passes():
            foreseen = one(passes)
            assert foreseen.shape == passes.load_BLE.shape
            assert np.isfinite(foreseen).all()
    for name in ("affinity", "gate", "recorded"):
        with pytest.raises(ProblemError, match="token traces"):
            foreseer(name, error=0.1, distance=1)
    for name in ("gate", "recorded"):
        with pytest.raises(ProblemError, match="recorded predictions"):
            foreseer(name, error=0.1, distance=1, composition=composition)
    with pytest.raises(ProblemError, match="learn"):
        foreseer("affinity", error=0.1, distance=1, composition=composition)
    with pytest.raises(ProblemError, match="unknown"):
        foreseer("oracle", error=0.1, distance=1)


def test_transitions_make_the_affinity_that_they_came_from() -> None:
    routes = traces_of(14).experts_TLK
    made = Affinity(LAYERS, EXPERTS, furthest=2).learn(routes)
    again = Affinity.counted(made.transitions_DLEE)
    for layer in range(LAYERS - 2):
        assert np.array_equal(again.chance_EE(layer, 2), made.chance_EE(layer, 2))


# ------------------------------------------------------------------- the recording that is shipped


def test_shipped_predictions_rank_as_measured() -> None:
    """Trained gates beat plain ones, which beat affinity, one layer ahead; file and figures as documented."""
    path = tiny_moe_predictions_file()
    assert path.stat().st_size < 500_000
    predictions = read_predictions(path, experts=TINY_MOE.experts)
    assert predictions.traces.experts_TLK.shape[1:] == (TINY_MOE.layers, TINY_MOE.top_k)
    assert len(set(predictions.traces.domains)) == 8
    composition = Composition(
        traces=predictions.traces, arrivals=poisson_arrivals(16, 25, seed=0), stay=0.9, seed=0
    )
    wrong = {}
    for name in ("affinity", "gate", "recorded"):
        judged = JudgedForeseer(
            foreseer(name, error=0.0, distance=1, composition=composition, predictions=predictions)
        )
        for passes in composition.passes():
            judged(passes)
        wrong[name] = judged.distance_L[1:].mean()
    assert wrong["recorded"] < 0.05
    assert wrong["recorded"] < 0.4 * wrong["gate"]
    assert wrong["gate"] < wrong["affinity"]


def test_shipped_chances_sum_up() -> None:
    """Rounded to quarters, yet the sums over whole requests are the number of pairs, nearly."""
    predictions = read_predictions(tiny_moe_predictions_file(), experts=TINY_MOE.experts)
    chance = predictions.said["chance_tuned"]
    for d in range(5):
        total = predictions.unit * chance[:, d + 1 :, d].sum((0, 2), dtype=np.int64)
        assert total == pytest.approx(np.full(TINY_MOE.layers - d - 1, 2.0 * len(chance)), rel=0.03)
        assert not chance[:, : d + 1, d].any()
