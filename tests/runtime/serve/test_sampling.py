"""Tokens chosen by each request's own rules and random numbers, whatever else is in the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moeless_opt.problems.errors import ProblemError
from moeless_opt.runtime.serve import Sampling
from moeless_opt.runtime.serve.engine.sampling import choose_tokens, seeded_uniform


def reference(logits: np.ndarray, rule: Sampling, place: int) -> int:
    """One row by the definitions, slowly."""
    if rule.temperature == 0:
        return int(np.argmax(logits))
    x = logits.astype(np.float64) / rule.temperature
    order = sorted(range(len(x)), key=lambda v: (-x[v], v))
    weights = np.exp(x - x.max())
    weights /= weights.sum()
    kept = order[: rule.top_k] if rule.top_k else order
    total = sum(weights[v] for v in kept)
    nucleus, mass = [], 0.0
    for v in kept:
        if mass >= rule.top_p:
            break
        nucleus.append(v)
        mass += weights[v] / total
    u = seeded_uniform([rule.seed], [place])[0] * sum(weights[v] for v in nucleus)
    for v in nucleus:
        u -= weights[v]
        if u < 0:
            return v
    return nucleus[-1]


def rules(rng: np.random.Generator, count: int) -> list[Sampling]:
    return [
        Sampling(
            temperature=float(rng.choice([0.0, 0.3, 1.0, 2.5])),
            top_p=float(rng.choice([0.05, 0.5, 0.9, 1.0])),
            top_k=int(rng.choice([0, 1, 5, 50, 1000])),
            seed=int(rng.integers(0, 2**40)),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("seed", range(8))
def test_rows_are_chosen_as_each_alone_by_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(40, 37)) * rng.choice([0.1, 1, 10])
    given, places = rules(rng, 40), rng.integers(0, 500, size=40).tolist()
    found = [c.token for c in choose_tokens(torch.from_numpy(logits), given, places)]
    assert found == [reference(logits[i], given[i], places[i]) for i in range(40)]
    order = rng.permutation(40)
    mixed = choose_tokens(
        torch.from_numpy(logits[order]), [given[i] for i in order], [places[i] for i in order]
    )
    assert [c.token for c in mixed] == [found[i] for i in order]


def test_draws_follow_the_distribution() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    many = 4000
    rule = [Sampling(temperature=1.0, seed=s) for s in range(many)]
    tokens = [c.token for c in choose_tokens(logits.expand(many, 4), rule, [3] * many)]
    share = np.bincount(tokens, minlength=4) / many
    assert np.abs(share - [0.5, 0.3, 0.15, 0.05]).max() < 0.03
    cut = [Sampling(temperature=1.0, top_p=0.75, seed=s) for s in range(many)]
    assert {c.token for c in choose_tokens(logits.expand(many, 4), cut, [0] * many)} == {0, 1}


def test_numbers_are_even_and_differ_by_seed_and_place() -> None:
    u = seeded_uniform(list(range(2000)) * 2, [0] * 2000 + [1] * 2000)
    assert len(set(u.tolist())) == 4000
    assert abs(u.mean() - 0.5) < 0.02
    assert 0 <= u.min() < u.max() < 1
    assert abs(np.corrcoef(u[:2000], u[2000:])[0, 1]) < 0.06


def test_probabilities_are_those_of_the_model() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [0.0, 0.0, 5.0]])
    told, silent = choose_tokens(
        logits, [Sampling(temperature=0, logprobs=2), Sampling(temperature=0)], [0, 0]
    )
    right = torch.log_softmax(logits[0].double(), 0)
    assert told.token == 1
    assert told.logprob == pytest.approx(float(right[1]))
    assert [t for t, _ in told.top] == [1, 2]
    assert told.top[1][1] == pytest.approx(float(right[2]))
    assert silent.logprob is None
    assert silent.top == ()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1),
        ("temperature", float("nan")),
        ("temperature", 1e9),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("top_k", 1.5),
        ("seed", "x"),
        ("stop", ("",)),
        ("max_tokens", 0),
        ("logprobs", 21),
    ],
)
def test_wrong_settings_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ProblemError, match=f"^{field}"):
        Sampling(**{field: value})  # type: ignore[arg-type]
