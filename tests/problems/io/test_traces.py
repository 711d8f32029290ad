"""Token traces, arrivals, and the stream that is composed of both."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless_opt.problems.errors import FormatError, ProblemError
from moeless_opt.problems.instances.tiny_moe_traces import tiny_moe_traces, tiny_moe_traces_file
from moeless_opt.problems.io.traces import (
    Arrivals,
    Lengths,
    TokenTraces,
    compose_steps,
    poisson_arrivals,
    read_arrivals,
    read_lengths,
    read_token_traces,
)


def traces_of(seed: int, requests: int = 5, layers: int = 2, top_k: int = 2, experts: int = 6) -> TokenTraces:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 9, requests)
    return TokenTraces(
        experts_TLK=rng.integers(0, experts, (int(tokens.sum()), layers, top_k)),
        offsets=np.concatenate([[0], np.cumsum(tokens)]),
        experts=experts,
        prompt_tokens=np.array([rng.integers(0, n) for n in tokens]),
    )


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


def test_loads_and_split_by_request() -> None:
    traces = traces_of(3)
    by_hand = np.zeros((2, 6))
    for token in traces.experts_TLK:
        for layer, chosen in enumerate(token):
            np.add.at(by_hand[layer], chosen, 1)
    assert np.array_equal(traces.load_LE(), by_hand)
    one, other = traces.split(0.4, seed=2)
    assert sorted([*one, *other]) == list(range(traces.requests))
    assert len(one) == 2
    assert np.array_equal(traces.load_LE(one) + traces.load_LE(other), by_hand)


def test_the_packages_own_traces_have_the_form() -> None:
    read = read_token_traces(tiny_moe_traces_file(), experts=16)
    own = tiny_moe_traces()
    assert read.domains == own.domains
    assert read.requests == own.requests
    assert np.array_equal(read.request(7), own.request(7))
    assert np.array_equal(read.prompt_tokens, own.prompt_tokens)
    window = next(iter(compose_steps(own, poisson_arrivals(20, 10), step_seconds=0.05)))
    assert window.load_SLE.shape == (64, 6, 16)


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"offsets": [0, 3]}, "offsets"),
        ({"offsets": [0, 2, 2, 4]}, "offsets"),
        ({"experts": 2}, "experts_TLK"),
        ({"experts_TLK": np.zeros((4, 1))}, "experts_TLK"),
        ({"prompt_tokens": [5, 0]}, "prompt_tokens"),
        ({"domain": [0, 3], "domains": ("a",)}, "domain"),
    ],
)
def test_bad_traces_name_the_field(changes: dict[str, object], where: str) -> None:
    good: dict[str, object] = {
        "experts_TLK": np.array([0, 1, 2, 1]).reshape(4, 1, 1),
        "offsets": [0, 2, 4],
        "experts": 3,
    }
    TokenTraces(**good)  # type: ignore[arg-type]
    with pytest.raises(ProblemError, match=where):
        TokenTraces(**(good | changes))  # type: ignore[arg-type]


AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n{}"


def test_azure_and_mooncake(tmp_path: Path) -> None:
    text = AZURE.format("2023-11-16 18:15:47.5000000,10,3\n2023-11-16 18:15:46.2500000,20,0\n")
    for name, data in (("a.csv", text.encode()), ("a.csv.gz", gzip.compress(text.encode()))):
        (tmp_path / name).write_bytes(data)
        found = read_arrivals(tmp_path / name)
        assert found.time_R.tolist() == [0.0, 1.25]
        assert found.prompt_R.tolist() == [20, 10]
        assert found.output_R.tolist() == [1, 3]  # who writes nothing still takes a pass
    lines = [{"timestamp": t, "input_length": 5, "output_length": 7, "hash_ids": []} for t in (0, 1500)]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = read_arrivals(tmp_path / "m.jsonl")
    assert found.time_R.tolist() == [0.0, 1.5]
    assert found.seconds == 1.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("when,what\n1,2\n", "no column 'TIMESTAMP'"),
        (AZURE.format("yesterday,1,2\n"), "line 2.*no time stamp"),
        (AZURE.format("2023-11-16 18:15:47,x,2\n"), "line 2.*'x' is no whole number"),
        (AZURE.format("2023-11-16 18:15:47,-4,2\n"), "line 2.*-4 tokens"),
        (AZURE.format("2023-11-16 18:15:47\n"), "line 2.*1 columns"),
        (AZURE.format(""), "no lines"),
        ('{"timestamp": 0}\n', "line 1.*input_length"),
    ],
)
def test_bad_arrivals_name_the_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(FormatError, match=message):
        read_arrivals(tmp_path / "x.csv")
    with pytest.raises(FormatError, match="cannot be read"):
        read_arrivals(tmp_path / "absent.csv")


def test_bad_archive(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(b"no archive")
    with pytest.raises(FormatError, match="no readable"):
        read_token_traces(tmp_path / "x.npz")
    np.savez(tmp_path / "y.npz", experts=np.zeros((2, 1, 1), np.uint8))
    with pytest.raises(FormatError, match="no array 'offsets'"):
        read_token_traces(tmp_path / "y.npz")


def test_lengths_are_drawn_by_the_seed(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("num_prefill_tokens,num_decode_tokens\n7,8\n9,0\n")
    lengths = read_lengths(tmp_path / "l.csv")
    arrivals = poisson_arrivals(10, 5, seed=3)
    a, b = (arrivals.with_lengths(lengths, seed=4) for _ in range(2))
    assert np.array_equal(a.prompt_R, b.prompt_R)
    assert set(zip(a.prompt_R.tolist(), a.output_R.tolist(), strict=True)) == {(7, 8), (9, 1)}
    assert np.array_equal(a.time_R, arrivals.time_R)
    with pytest.raises(ProblemError, match="lengths"):
        Lengths(prompt_R=np.array([1]), output_R=np.array([1, 2]))


def test_arrivals_in_order_and_cut() -> None:
    with pytest.raises(ProblemError, match=r"time\[2\]"):
        Arrivals(time_R=np.array([0, 2, 1.0]), prompt_R=np.ones(3), output_R=np.ones(3))
    arrivals = Arrivals(time_R=np.array([0, 1, 2.0]), prompt_R=np.ones(3), output_R=np.ones(3))
    assert arrivals.first(1.5).requests == 2
    mean = np.mean([poisson_arrivals(4.0, 100.0, seed=s).requests - 1 for s in range(20)])
    assert abs(mean - 400) < 5 * 20 / 20**0.5


def test_real_recordings(shared_data: Path) -> None:
    traces = read_token_traces(shared_data / "gptoss20b_topk.npz", experts=32)
    assert (traces.requests, *traces.experts_TLK.shape) == (703, 215438, 24, 4)
    arrivals = read_arrivals(shared_data / "requests" / "AzureLLMInferenceTrace_conv_2023.csv.gz")
    assert arrivals.requests == 19366
    assert 3501 < arrivals.seconds < 3503
    window = list(compose_steps(traces, arrivals.first(60), step_seconds=0.025))[-1]
    assert np.array_equal(window.load_SLE.sum(2), np.repeat(window.live_S[:, None] * 4, 24, axis=1))
