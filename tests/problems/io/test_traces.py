"""Token traces: their form, loads and splits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moeless_opt.problems.errors import FormatError, ProblemError
from moeless_opt.problems.instances.tiny_moe_traces import tiny_moe_traces, tiny_moe_traces_file
from moeless_opt.problems.io.arrivals import poisson_arrivals
from moeless_opt.problems.io.traces import TokenTraces, read_token_traces
from moeless_opt.runtime.simulate.compose import compose_steps
from tests.strategies import traces_of


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
    alone = TokenTraces(experts_TLK=traces.request(0), experts=6, offsets=[0, len(traces.request(0))])
    with pytest.raises(ProblemError, match=r"^traces: have 1 request, two sets of them need at least two"):
        alone.split(0.5)


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


def test_bad_archive(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(b"no archive")
    with pytest.raises(FormatError, match=r"is no .npz archive"):
        read_token_traces(tmp_path / "x.npz")
    np.savez(tmp_path / "y.npz", experts=np.zeros((2, 1, 1), np.uint8))
    with pytest.raises(FormatError, match="no array 'offsets'"):
        read_token_traces(tmp_path / "y.npz")
