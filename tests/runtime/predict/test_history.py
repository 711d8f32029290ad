"""Predictors that need no model: against loops, closed forms and traffic whose future is known."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.instances.tiny_moe_traces import tiny_moe_traces
from moeless_opt.runtime.predict.affinity import Affinity
from moeless_opt.runtime.predict.history import AutoRegressive, Calibrated, Ewma, LastWindow, LinearTrend
from moeless_opt.runtime.predict.measures import count_loads, load_distance, token_hits, top_load_hits
from moeless_opt.runtime.predict.predictor import Context, Predictor, TokenPredictor

HISTORY = [LastWindow, lambda: LastWindow(3), Ewma, LinearTrend, AutoRegressive]
LOADS = st.integers(0, 2**31).map(
    lambda seed: np.random.default_rng(seed).integers(0, 50, (3, 5)).astype(float)
)


def known(load_E: Any, layer: int = 0, experts_TK: Any = None) -> Context:
    return Context(layer=layer, load_E=np.asarray(load_E, float), experts_TK=experts_TK)


# ------------------------------------------------------------------------------------------- scores


def test_distance_is_the_share_that_would_have_to_move() -> None:
    assert load_distance(np.array([4.0, 0, 4]), np.array([2.0, 1, 1])) == pytest.approx(0.25)
    assert load_distance(np.array([1.0, 0]), np.array([0.0, 9])) == 1
    assert load_distance(np.zeros(2), np.zeros(2)) == 0
    assert load_distance(np.zeros(2), np.ones(2)) == 1


@given(LOADS, st.floats(0.1, 9))
def test_distance_is_a_metric_of_distributions(load: Any, scale: float) -> None:
    a, b, c = load + 1
    assert load_distance(a, a * scale) == pytest.approx(0, abs=1e-12)
    assert load_distance(a, b) == pytest.approx(load_distance(b, a))
    assert load_distance(a, c) <= load_distance(a, b) + load_distance(b, c) + 1e-12


def test_hits_break_ties_by_index() -> None:
    assert top_load_hits(np.array([5.0, 5, 5, 0]), np.array([9.0, 8, 1, 1]), 2) == 1
    assert top_load_hits(np.array([0.0, 5, 5, 0]), np.array([9.0, 8, 1, 1]), 2) == 0.5
    score = np.array([[0.9, 0.5, 0.1], [0.2, 0.1, 0.3]])
    assert token_hits(score, np.array([[1, 0], [1, 2]])) == 0.75


@given(st.integers(0, 1000))
def test_counts_are_those_of_a_loop(seed: int) -> None:
    routes = np.random.default_rng(seed).integers(0, 4, (7, 3, 2)).astype(np.uint8)
    slow = np.zeros((3, 4))
    for token in routes:
        for layer, chosen in enumerate(token):
            for e in chosen:
                slow[layer, e] += 1
    assert np.array_equal(count_loads(routes, 4), slow)


# ------------------------------------------------------------------------------------------ history


@pytest.mark.parametrize("make", HISTORY)
@settings(max_examples=20)
@given(passes=st.lists(LOADS, max_size=8))
def test_history_forecasts_are_loads_of_the_pass_at_hand(make: Any, passes: list[Any]) -> None:
    predictor = make()
    assert isinstance(predictor, Predictor)
    assert not isinstance(predictor, TokenPredictor)
    for load_LE in passes:
        predictor.observe(load_LE)
    load_E = predictor.predict(known([10, 0, 4, 0, 0]), 1)
    assert load_E.sum() == pytest.approx(14)
    assert (load_E >= 0).all()


@pytest.mark.parametrize("make", HISTORY)
def test_history_of_a_constant_is_the_constant(make: Any) -> None:
    predictor, load_LE = make(), np.array([[1.0, 2, 3], [6, 0, 0]])
    assert predictor.predict(known([3, 3, 3]), 1) == pytest.approx([3, 3, 3])
    for scale in (1, 5, 2, 9):
        predictor.observe(load_LE * scale)
    assert predictor.predict(known([6, 0, 0]), 1) == pytest.approx([6, 0, 0])
    assert LastWindow().predict(known([1, 0]), 1) == pytest.approx([0.5, 0.5])


def test_ewma_and_means_in_closed_form() -> None:
    passes = [np.array([[4.0, 0]]), np.array([[0.0, 4]]), np.array([[2.0, 2]])]
    for predictor, wanted in (
        (Ewma(0.5), 0.5),
        (Ewma(0.25), 0.6875),
        (LastWindow(), 0.5),
        (LastWindow(2), 0.25),
    ):
        for load_LE in passes:
            predictor.observe(load_LE)
        assert predictor._share_LE is not None
        assert predictor._share_LE[0, 0] == pytest.approx(wanted)


def test_a_trend_goes_on_and_stops_at_zero() -> None:
    trend = LinearTrend(4)
    for step in range(6):
        trend.observe(np.array([[10.0 + step, 10 - step], [1, 1]]))
    assert trend._share_LE is not None
    assert trend._share_LE[0] == pytest.approx([0.8, 0.2])
    for step in range(6, 10):
        trend.observe(np.array([[10.0 + step, 10 - step], [1, 1]]))
    trend.observe(np.array([[20.0, 0], [1, 1]]))
    assert trend._share_LE[0, 1] == 0


def test_ar1_finds_how_much_persists() -> None:
    """Of noise around a mean nothing persists, of slow waves nearly all; each gets the better forecast."""
    rng = np.random.default_rng(0)
    for phi, best in ((0.0, Ewma(0.05)), (0.97, LastWindow())):
        ar, state = AutoRegressive(), np.zeros(6)
        error = {"ar": 0.0, "best": 0.0}
        for step in range(400):
            state = phi * state + rng.normal(size=6) * 0.1
            load_LE = np.exp(state)[None]
            if step > 100:
                for name, predictor in (("ar", ar), ("best", best)):
                    assert predictor._share_LE is not None
                    error[name] += load_distance(predictor._share_LE[0], load_LE[0])
            ar.observe(load_LE)
            best.observe(load_LE)
        assert error["ar"] < 1.03 * error["best"]


def test_a_layer_without_load_keeps_its_forecast() -> None:
    last = LastWindow()
    last.observe(np.array([[1.0, 3], [2, 2]]))
    last.observe(np.array([[0.0, 0], [4, 0]]))
    assert last._share_LE is not None
    assert last._share_LE.tolist() == [[0.25, 0.75], [1, 0]]


# ----------------------------------------------------------------------------------------- affinity


@given(st.integers(0, 1000))
@settings(max_examples=20)
def test_transitions_are_those_of_a_loop(seed: int) -> None:
    routes = np.random.default_rng(seed).integers(0, 3, (20, 4, 2))
    affinity = Affinity(4, 3, furthest=3, smoothing=0).learn(routes)
    for layer, d in ((0, 1), (2, 1), (1, 2), (0, 3)):
        count = np.full((3, 3), 1e-12)
        for token in routes:
            for a in token[layer]:
                for b in token[layer + d]:
                    count[a, b] += 1
        seen = count.sum(1) > 1e-6
        chance = affinity.chance_EE(layer, d)
        np.testing.assert_allclose(chance.sum(1), 1)
        np.testing.assert_allclose(chance[seen], (count / count.sum(1, keepdims=True))[seen], atol=1e-6)


def test_a_fixed_route_is_predicted_exactly() -> None:
    """Expert e is always followed by e + d: loads and tokens are known for good."""
    start = np.random.default_rng(0).integers(0, 8, (500, 1, 1))
    routes = (start + np.arange(4)[:, None]) % 8
    affinity = Affinity(4, 8, smoothing=0).learn(routes)
    assert isinstance(affinity, TokenPredictor)
    load_LE = count_loads(routes, 8)
    at = known(load_LE[1], 1, routes[:, 1])
    np.testing.assert_allclose(affinity.predict(at, 2), load_LE[3], atol=1e-4)
    assert token_hits(affinity.scores(at, 2), routes[:, 3]) == 1


def test_older_transitions_fade() -> None:
    ab, aa = np.array([[[0], [1]]] * 10), np.array([[[0], [0]]] * 10)
    affinity = Affinity(2, 2, smoothing=0).learn(ab).learn(aa, decay=0.5)
    assert affinity.chance_EE(0, 1)[0] == pytest.approx([2 / 3, 1 / 3])


def test_affinity_beats_its_own_average_on_recorded_routes() -> None:
    """Requests that were not counted; what it must beat are the mean loads of those that were."""
    traces = tiny_moe_traces()
    train, test = range(0, traces.requests, 2), range(1, traces.requests, 32)
    routes = np.concatenate([traces.request(i) for i in train])
    affinity, mean_LE = Affinity(6, 16).learn(routes), count_loads(routes, 16)
    wrong = np.zeros(2)
    for i in test:
        load_LE = count_loads(traces.request(i), 16)
        for layer in range(5):
            wrong[0] += load_distance(affinity.predict(known(load_LE[layer], layer), 1), load_LE[layer + 1])
            wrong[1] += load_distance(mean_LE[layer + 1], load_LE[layer + 1])
    assert wrong[0] < 0.9 * wrong[1]


# -------------------------------------------------------------------------------------- calibration


class Biased:
    """Sees the truth through a distorting glass."""

    name = "biased"
    truth_LE = np.zeros((2, 4))
    factor_E = np.array([4.0, 1, 0.5, 1])

    def predict(self, context: Context, distance: int) -> Any:
        return self.truth_LE[context.layer + distance] * self.factor_E

    def observe(self, load_LE: Any) -> None:
        pass


def test_calibration_removes_a_steady_error() -> None:
    rng, inner = np.random.default_rng(0), Biased()
    calibrated = Calibrated(inner, caution=1e-3)
    wrong = []
    for _ in range(60):
        inner.truth_LE = rng.uniform(5, 15, size=(2, 4))
        at = known(inner.truth_LE[0])
        wrong.append(load_distance(calibrated.predict(at, 1), inner.truth_LE[1]))
        calibrated.observe(inner.truth_LE)
    assert wrong[0] > 0.2
    assert np.mean(wrong[-20:]) < 0.2 * wrong[0]


def test_calibration_leaves_a_right_prediction_and_totals_alone() -> None:
    inner = Biased()
    inner.factor_E = np.ones(4)
    calibrated = Calibrated(inner)
    for load in ([1.0, 2, 3, 4], [4.0, 3, 2, 1]):
        inner.truth_LE = np.array([load, load])
        assert calibrated.predict(known(load), 1) == pytest.approx(load)
        calibrated.observe(inner.truth_LE)
    inner.factor_E = np.array([2.0, 0, 1, 1])
    for _ in range(5):
        assert calibrated.predict(known(load), 1).sum() == pytest.approx(
            (inner.truth_LE[1] * inner.factor_E).sum()
        )
        calibrated.observe(inner.truth_LE)


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: Ewma(1.5), "weight"),
        (lambda: LinearTrend(1), "passes"),
        (lambda: Affinity(2, 2).learn(np.zeros((3, 3, 1), int)), "experts"),
        (lambda: Affinity(2, 2).learn(np.full((3, 2, 1), 2)), "experts"),
        (lambda: Affinity(2, 2).chance_EE(1, 1), "distance"),
        (lambda: Affinity(2, 2).scores(known([1, 1]), 1), "experts_TK"),
        (lambda: Ewma().observe(np.array([[np.nan, 1]])), "load"),
    ],
)
def test_bad_input_is_named(call: Any, says: str) -> None:
    with pytest.raises(ProblemError, match=says):
        call()


def test_a_layer_beyond_the_last_is_refused() -> None:
    last = LastWindow()
    last.observe(np.ones((2, 3)))
    with pytest.raises(ProblemError, match="distance"):
        last.predict(known([1, 1, 1], layer=1), 1)


def test_baselines_need_no_torch() -> None:
    code = "import sys, moeless_opt.runtime.predict.history; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
