"""Experts in a pool: places that are taken and given back, and grouped products against single ones."""

from __future__ import annotations

import gc

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from moeless_opt.runtime.live.experts import MemoryMeter, Weights  # noqa: E402
from moeless_opt.runtime.live.grouped import GroupedExperts, can_group  # noqa: E402
from moeless_opt.runtime.live.pooled import PooledBank  # noqa: E402

H, INNER = 32, 24


def expert(number: int, dtype: torch.dtype = torch.float32) -> Weights:
    chance = torch.Generator().manual_seed(number)
    return [
        torch.randn(shape, generator=chance).mul_(0.2).to(dtype) for shape in ((2 * INNER, H), (H, INNER))
    ]


def bank_of(
    experts: list[int], places: int, dtype: torch.dtype = torch.float32, limit: int | None = None
) -> PooledBank:
    resident = {e: expert(e, dtype) for e in experts}
    meter = MemoryMeter(limit)
    return PooledBank(3, resident, expert(0, dtype), torch.device("cpu"), meter, places)


def gated(x: torch.Tensor) -> torch.Tensor:
    gate, linear = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * linear


def arrive(bank: PooledBank, number: int) -> None:
    place = bank.allocate()
    for mine, theirs in zip(place, expert(number), strict=True):
        mine.data.copy_(theirs)
    bank.staged[number] = place


def holds(bank: PooledBank) -> bool:
    return all(
        torch.equal(t, w) for e in bank.order for t, w in zip(bank.resident[e], expert(e), strict=True)
    )


def test_places_are_given_back_and_nothing_is_allocated() -> None:
    bank = bank_of([4, 7], places=4)
    held = bank.meter.now
    assert held == 4 * bank.expert_bytes
    for step in range(20):
        arrive(bank, 10 + step)
        bank.install([10 + step, bank.order[0]])
        assert holds(bank)
        assert all(bank.place_of(e) is not None for e in bank.order)
        assert bank.meter.now == bank.meter.peak == held
    bank.drop_staged()
    assert len(bank._free) == 2


def test_what_comes_without_a_place_moves_in_when_it_serves() -> None:
    bank = bank_of([0, 1], places=2)
    arrive(bank, 5)
    assert bank.meter.now == 3 * bank.expert_bytes
    bank.install([1, 5])
    assert holds(bank)
    assert [bank.place_of(e) for e in (1, 5)] == [1, 0]
    assert bank.meter.now == 2 * bank.expert_bytes


@pytest.mark.parametrize("served", [[1, 5, 6], [0, 1, 5, 6, 7]])
def test_a_pool_that_is_too_small_grows(served: list[int]) -> None:
    bank = bank_of([0, 1], places=2)
    for number in (5, 6, 7):
        arrive(bank, number)
    bank.install(served)
    assert holds(bank)
    assert sorted(bank.place_of(e) for e in served) == list(range(len(served)))
    bank.drop_staged()
    gc.collect()
    assert bank.meter.now == len(bank.stacks[0]) * bank.expert_bytes


def test_a_limit_of_memory_holds_for_the_pool() -> None:
    one = bank_of([0], places=1).expert_bytes
    with pytest.raises(MemoryError, match="exceed the limit"):
        bank_of([0, 1], places=4, limit=3 * one)
    bank = bank_of([0, 1], places=2, limit=2 * one)
    with pytest.raises(MemoryError, match="exceed the limit"):
        bank.allocate()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("on_input", [False, True])
def test_grouped_products_are_those_of_single_experts(dtype: torch.dtype, on_input: bool) -> None:
    """Slots in any order in the pool, without rows, one or many; float64 is looped over."""
    bank = bank_of([3, 1, 4, 9, 2], places=8, dtype=dtype)
    rows = GroupedExperts(bank, gated, on_input)
    bank.on_install = rows.follow
    assert rows.grouped == can_group(dtype) == (dtype != torch.float64)
    bank.install([9, 2, 3])
    place = bank.allocate()
    for mine, theirs in zip(place, expert(5, dtype), strict=True):
        mine.data.copy_(theirs)
    bank.staged[5] = place
    bank.install([2, 5, 9])
    order = rows.slot_order()
    assert order is not None
    chance = torch.Generator().manual_seed(0)
    for sizes in ([0, 0, 0], [1, 0, 0], [0, 7, 1], [300, 1, 0], [5, 6, 7]):
        x = torch.randn(sum(sizes), H, generator=chance).to(dtype)
        probs = torch.rand(sum(sizes), generator=chance).to(dtype)
        out, bias = rows(x, np.array(sizes), probs)
        assert bias is None
        wanted = []
        for slot, part, p in zip(order, torch.split(x, sizes), torch.split(probs, sizes), strict=True):
            first, second = expert(bank.order[slot], dtype)
            part = part * p[:, None] if on_input else part
            inner = gated(torch.nn.functional.linear(part, first))
            inner = inner if on_input else inner * p[:, None]
            wanted.append(torch.nn.functional.linear(inner, second))
        torch.testing.assert_close(
            out, torch.cat(wanted), rtol=2e-2, atol=2e-2 if dtype.itemsize < 4 else 1e-5
        )
    assert {id(p) for p in rows.parameters()} == {id(t) for e in bank.order for t in bank.resident[e]}
