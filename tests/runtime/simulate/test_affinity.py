"""Affinity between layers: counted as loops count it, and generated traffic has what was fitted."""

from __future__ import annotations

import numpy as np
import pytest

from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.instances.tiny_moe_traces import tiny_moe_traces
from moeless_opt.problems.io.traces import loads_by_step
from moeless_opt.runtime.simulate.affinity import LayerAffinity, explained, transitions
from moeless_opt.runtime.simulate.traffic import RoutingModel


def test_transitions_are_counted_over_tokens() -> None:
    rng = np.random.default_rng(0)
    experts = rng.integers(0, 4, (50, 3, 2))
    table = np.full((2, 4, 4), 0.5)
    for token in experts:
        for layer in range(2):
            for now in token[layer]:
                for then in token[layer + 1]:
                    table[layer, now, then] += 1
    assert transitions(experts, 4) == pytest.approx(table / table.sum(2, keepdims=True))


def test_generated_traffic_has_the_affinity_of_the_traces() -> None:
    traces = tiny_moe_traces()
    tokens_R = np.diff(traces.offsets)
    owner = np.repeat(np.arange(traces.requests), tokens_R)
    load_RLE = loads_by_step(traces, np.arange(len(owner)), owner, traces.requests)
    domain_R = np.unique(np.asarray(traces.domain), return_inverse=True)[1]
    pairs_R = 2 * tokens_R
    table = transitions(traces.experts_TLK, traces.experts)
    plain, model = RoutingModel.fit(traces), RoutingModel.fit(traces, affinity=True)
    mean_RLE = model.popularity_DLE[domain_R]
    measured = explained(table, load_RLE / pairs_R[:, None, None], mean_RLE)
    found = {}
    for name, one in (("plain", plain), ("model", model)):
        rng = np.random.default_rng(3)
        share_RLE = one.distributions(domain_R, rng).astype(np.float64)
        share_RLE /= share_RLE.sum(2, keepdims=True)
        count = rng.multinomial(np.broadcast_to(pairs_R[:, None], share_RLE.shape[:2]), share_RLE)
        off_RLE = count / pairs_R[:, None, None] - mean_RLE
        found[name] = explained(table, off_RLE + mean_RLE, mean_RLE)
        # Requests differ from their domains as much as with independent layers, and as measured.
        spread = (off_RLE**2).sum()
        wanted = ((load_RLE / pairs_R[:, None, None] - mean_RLE) ** 2).sum()
        assert 0.85 * wanted < spread < 1.15 * wanted
        assert count.sum(0) / count.sum() == pytest.approx(load_RLE.sum(0) / load_RLE.sum(), abs=3e-3)
    assert measured > 0.2
    assert found["plain"] < 0.01
    assert 0.65 * measured < found["model"] < 1.25 * measured


def test_other_dimensions_keep_the_share_that_is_foretold() -> None:
    model = RoutingModel.fit(tiny_moe_traces(), affinity=True)
    other = model.like(10, 64, 4, seed=1)
    assert other.affinity is not None
    assert other.affinity.transition_MEE.shape == (9, 64, 64)
    assert other.affinity.transition_MEE.sum(2) == pytest.approx(1.0)
    popularity = other.popularity_DLE.mean(0)
    came = np.einsum("me,mef->mf", popularity[:-1], other.affinity.transition_MEE)
    assert np.abs(came - popularity[1:]).mean() < 0.05 * popularity.mean()
    shares = other.distributions(np.zeros(400, dtype=np.int64), np.random.default_rng(0)).astype(np.float64)
    mean = np.broadcast_to(other.popularity_DLE[0], shares.shape)
    assert 0.1 < explained(other.affinity.transition_MEE, shares, mean) < 0.35


def test_what_does_not_fit_is_refused() -> None:
    table = np.full((2, 3, 3), 1 / 3)
    affinity = LayerAffinity(transition_MEE=table, weight=1.0, concentration=5.0)
    with pytest.raises(ProblemError, match=r"routing\.affinity"):
        RoutingModel(popularity_DLE=np.ones((1, 2, 3)), concentration=1.0, top_k=1, affinity=affinity)
    with pytest.raises(ProblemError, match="sum to 1"):
        LayerAffinity(transition_MEE=table * 2, weight=1.0, concentration=5.0)
    with pytest.raises(ProblemError, match="must be"):
        LayerAffinity(transition_MEE=table[0], weight=1.0, concentration=5.0)
