"""Kernels that move rows, beside torch's operations: the same bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from moeless_opt.runtime.live.dispatch import device  # noqa: E402
from moeless_opt.runtime.live.dispatch.device import rows as rooms  # noqa: E402
from moeless_opt.runtime.live.dispatch.dispatcher import chosen_experts  # noqa: E402


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks so small that few rows and channels fill several."""
    monkeypatch.setattr(rooms, "FEW", 4)
    monkeypatch.setattr(rooms, "MANY", 8)
    monkeypatch.setattr(rooms, "WIDE", 16)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("rows", [0, 1, 4, 7, 8, 9, 37])
@pytest.mark.parametrize("experts", [1, 3, 8])
@pytest.mark.parametrize("most", [0, 100])
def test_rows_are_sorted_stably_and_know_where_they_went(
    rows: int, experts: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rooms, "MOST", most)
    rng = np.random.default_rng(rows + 100 * experts)
    # E and more are of no expert.
    expert_N = torch.from_numpy(rng.integers(0, experts + 2, rows))
    counts, order, back = device.sort_rows(expert_N, experts)
    assert counts.tolist() == [int((expert_N == e).sum()) for e in range(experts)]
    wanted = torch.argsort(expert_N.clamp(max=experts), stable=True)
    assert order.tolist() == wanted.tolist()
    for i, e in enumerate(expert_N.tolist()):
        assert back[i] == (wanted.tolist().index(i) if e < experts else -1)


def test_choices_may_stand_apart_and_be_short() -> None:
    """A view of a wider table, or of another type."""
    wide = torch.tensor([[2, 9], [0, 9], [2, 9], [1, 9]])
    wanted = [[1, 1, 2], [1, 3, 0, 2], [2, 0, 3, 1]]
    assert [t.tolist() for t in device.sort_rows(wide[:, :1].reshape(-1), 3)] == wanted
    found = device.sort_rows(wide[:, 0].int(), 3)
    assert [t.tolist() for t in found] == wanted
    assert {t.dtype for t in found} == {torch.int64}


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize(("width", "topk"), [(1, 1), (16, 2), (40, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_gathered_and_added_up(tokens: int, width: int, topk: int, dtype: Any) -> None:
    rng = torch.Generator().manual_seed(tokens + width)
    x = torch.randn((tokens, width), generator=rng).to(dtype)
    weight = torch.rand(tokens * topk, generator=rng)
    order = torch.randperm(tokens * topk, generator=rng)[: max(tokens * topk - 1, 0)]
    sent, sent_weight = device.gather_rows(x, weight, order, topk)
    assert torch.equal(sent, x[order // topk])
    assert torch.equal(sent_weight, weight[order])
    # One row is missing; the others are added one after the other, each sum rounded.
    back = torch.full((tokens * topk,), -1)
    back[order] = torch.arange(len(order))
    made = (sent * 1.7).to(dtype)
    padded = torch.cat((made, made.new_zeros(1, width)))
    wanted = torch.zeros((tokens, width), dtype=dtype)
    for place_T in back.view(tokens, topk).t():
        wanted = wanted + padded[place_T]
    found = device.combine_rows(made, back, topk)
    if dtype is torch.bfloat16:  # the interpreter cuts off where a GPU rounds
        torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)
    else:
        assert torch.equal(found, wanted)


@pytest.mark.parametrize(("experts", "topk"), [(1, 1), (5, 2), (8, 8), (3, 3)])
@pytest.mark.parametrize("even", [True, False])
def test_chosen_experts_are_those_of_the_map(experts: int, topk: int, even: bool) -> None:
    rng = np.random.default_rng(experts + topk)
    chosen_TE = np.zeros((6, experts), dtype=bool)
    for row in chosen_TE:
        row[rng.permutation(experts)[: topk if even else rng.integers(0, topk + 1)]] = True
    routing_map, probs = torch.from_numpy(chosen_TE), torch.rand(6, experts)
    expert_Tk, weight_Tk = device.chosen_of(routing_map, probs, topk)
    wanted = chosen_experts(routing_map, topk)
    assert expert_Tk.tolist() == wanted.tolist()
    real = wanted < experts
    assert torch.equal(weight_Tk[real], probs.gather(1, wanted.clamp(max=experts - 1))[real])
    assert (weight_Tk[~real] == 0).all()


def test_ends_of_places() -> None:
    size, place = torch.tensor([3, 0, 5]), torch.tensor([1, 2, 4], dtype=torch.int32)
    assert device.place_ends(size, place, 6).tolist() == [0, 3, 3, 3, 8, 8]
    assert device.place_ends(size[:0], place[:0], 2).tolist() == [0, 0]
