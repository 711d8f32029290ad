"""The stream that is composed of routing and arrivals, against a slow loop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless_opt.problems.io.arrivals import Arrivals, poisson_arrivals, read_arrivals
from moeless_opt.problems.io.traces import TokenTraces, read_token_traces
from moeless_opt.runtime.simulate.compose import compose_steps
from tests.strategies import traces_of


def slowly(traces: TokenTraces, arrivals: Arrivals, step: float, seed: int, prompts: bool) -> np.ndarray:
    """Every request, token by token: loads of every step up to the last arrival's."""
    drawn = np.random.default_rng(seed).integers(0, traces.requests, arrivals.requests)
    first = [int(np.ceil(t / step - 1e-9)) for t in arrivals.time_R]
    load = np.zeros((first[-1] + 1, traces.experts_TLK.shape[1], traces.experts))
    for i, start in zip(drawn, first, strict=True):
        routed, prompt = traces.request(i), int(traces.prompt_tokens[i])
        for n, token in enumerate(routed):
            if n < prompt and not prompts:
                continue
            at = start if n < prompt else start + n - prompt
            if at >= len(load):
                continue
            for layer, chosen in enumerate(token):
                for expert in chosen:
                    load[at, layer, expert] += 1
    return load


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 7), st.booleans())
def test_composition_is_that_of_the_slow_loop(seed: int, window: int, prompts: bool) -> None:
    traces = traces_of(seed)
    arrivals = poisson_arrivals(3.0, 10.0, seed=seed)
    parts = list(compose_steps(traces, arrivals, step_seconds=0.4, window=window, prompts=prompts, seed=seed))
    wanted = slowly(traces, arrivals, 0.4, seed, prompts)
    assert len(parts) == len(wanted) // window
    for part in parts:
        assert np.array_equal(part.load_SLE, wanted[part.start : part.start + window])
        assert np.array_equal(part.load_LE, part.load_SLE.sum(0))
    if not prompts:  # a live request is a token: each chooses top-k experts in every layer
        for part in parts:
            assert np.array_equal(part.load_SLE.sum(2), np.repeat(part.live_S[:, None] * 2, 2, axis=1))


def test_drawing_from_some_requests_leaves_the_others_out() -> None:
    traces = TokenTraces(
        experts_TLK=np.repeat([0, 1, 2], 4).reshape(12, 1, 1), offsets=np.array([0, 4, 8, 12]), experts=3
    )
    arrivals = poisson_arrivals(5.0, 20.0, seed=1)
    total = sum(part.load_LE for part in compose_steps(traces, arrivals, step_seconds=0.1, requests=[0, 2]))
    assert total[0, 1] == 0
    assert total[0, 0] > 0
    assert total[0, 2] > 0


def test_real_recordings(shared_data: Path) -> None:
    traces = read_token_traces(shared_data / "gptoss20b_topk.npz", experts=32)
    assert (traces.requests, *traces.experts_TLK.shape) == (703, 215438, 24, 4)
    arrivals = read_arrivals(shared_data / "requests" / "AzureLLMInferenceTrace_conv_2023.csv.gz")
    assert arrivals.requests == 19366
    assert 3501 < arrivals.seconds < 3503
    window = list(compose_steps(traces, arrivals.first(60), step_seconds=0.025))[-1]
    assert np.array_equal(window.load_SLE.sum(2), np.repeat(window.live_S[:, None] * 4, 24, axis=1))
