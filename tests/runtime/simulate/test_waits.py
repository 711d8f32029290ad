"""Waiting for weights and decisions, and ports shared with the all-to-all, against plain sums."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless_opt.runtime.simulate.waits import slowed, stretched, waits

SECONDS = st.floats(0.0, 5.0)


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Loads [L], and layer and network seconds of the pass before and of this one, [2, L] each; distance."""
    layers = draw(st.integers(1, 6))

    def times() -> np.ndarray:
        network = np.array(draw(st.lists(SECONDS, min_size=layers, max_size=layers)))
        rest = np.array(draw(st.lists(SECONDS, min_size=layers, max_size=layers)))
        return np.stack([network + rest, network])

    load = np.array(draw(st.lists(SECONDS, min_size=layers, max_size=layers)))
    return load, times(), times(), draw(st.integers(1, layers))


@settings(max_examples=150, deadline=None)
@given(cases(), st.floats(0.0, 3.0))
def test_without_contention_it_is_what_the_layers_before_do_not_hide(
    case: tuple[np.ndarray, np.ndarray, np.ndarray, int], decide: float
) -> None:
    load, before, now, distance = case
    wait, longer = waits(load, before, now, distance, decide=decide)
    line = [*before[0], *now[0]]
    layers = len(load)
    for layer in range(layers):
        hidden = sum(line[layers + layer - distance : layers + layer])
        late = max(decide - hidden, 0.0)
        expected = max(decide + load[layer] - hidden, 0.0) if load[layer] > 0 else late
        assert wait[layer] == pytest.approx(expected, abs=1e-9)
    assert not longer.any()


@settings(max_examples=150, deadline=None)
@given(cases())
def test_contention_costs_no_more_than_one_after_the_other(
    case: tuple[np.ndarray, np.ndarray, np.ndarray, int],
) -> None:
    load, before, now, distance = case
    alone, _ = waits(load, before, now, distance)
    wait, longer = waits(load, before, now, distance, contention=True)
    assert (longer >= 0).all()
    assert (longer <= now[1] + 1e-12).all(), "an all-to-all takes twice as long at most"
    assert longer.sum() <= load.sum() + 1e-9
    # Waiting is at most what the port needs for the all-to-all of those layers on top of what was waited for.
    line = np.concatenate([before[1], now[1]])
    for layer in range(len(load)):
        port = line[len(load) + layer - distance : len(load) + layer].sum()
        assert wait[layer] <= alone[layer] + port + 1e-9


def test_two_layers_by_hand() -> None:
    before = np.array([[5.0, 5.0], [1.0, 1.0]])
    now = np.array([[4.0, 6.0], [2.0, 3.0]])
    load = np.array([0.0, 6.0])
    # Layer 1 loads while layer 0 runs: 6 s beside 4, of which 2 are all-to-all, drawn out to 4.
    wait, longer = waits(load, before, now, 1, contention=True)
    assert longer.tolist() == [2.0, 0.0]
    assert wait.tolist() == [0.0, 6.0 - (4.0 + 2.0 - 2.0)]
    assert waits(load, before, now, 1)[0].tolist() == [0.0, 2.0]
    assert waits(load, before, now, 1, decide=1.5)[0].tolist() == [0.0, 3.5]
    assert waits(np.zeros(2), before, now, 1, decide=4.5)[0].tolist() == [0.0, 0.5]
    assert slowed(np.array([1.0, 9.0, 9.0]), np.array([4.0, 4.0, 6.0]), 2).tolist() == [1.0, 3.0, 0.0]


def test_a_stretched_migration_moves_the_same_bytes() -> None:
    share = 0.3
    seconds = stretched(2.0, share)
    busy = 2 * share / (1 + share)  # of the time, the all-to-all now twice as long
    assert seconds * (1 - busy / 2) == pytest.approx(2.0)
