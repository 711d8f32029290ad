"""Several ranks in one process: whatever the placement, the outputs are those of all experts on one GPU."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from moeless_opt.problems.errors import ProblemError
from moeless_opt.runtime.live.dispatch.dispatcher import SlotDispatcher
from moeless_opt.runtime.live.dispatch.shares import (
    BalancedShares,
    EqualShares,
    PlannedShares,
    SharePolicy,
    pour,
    share_policy,
)
from moeless_opt.runtime.live.slots import SlotTable, rows_to_slots


class Ring:
    """Collectives of ranks that are threads."""

    def __init__(self, ranks: int, node_R: list[int]) -> None:
        self.size, self.node_R = ranks, node_R
        self.barrier = threading.Barrier(ranks, timeout=30)
        self.box: list[Any] = [None] * ranks

    def swap(self, rank: int, value: Any) -> list[Any]:
        """Everybody's values."""
        self.barrier.wait()
        self.box[rank] = value
        self.barrier.wait()
        found = list(self.box)
        self.barrier.wait()
        return found

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """Do the same on every rank; where one fails nobody waits for it."""

        def guarded(rank: int) -> Any:
            try:
                return work(rank)
            except BaseException:
                self.barrier.abort()
                raise

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(guarded, range(self.size)))


class Rank:
    """What a dispatcher asks of its group."""

    def __init__(self, ring: Ring, rank: int) -> None:
        self.ring, self.rank = ring, rank
        self.size, self.node_R, self.device = ring.size, ring.node_R, torch.device("cpu")

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def host_wait(self) -> Any:
        return contextlib.nullcontext()

    def all_gather(self, mine: torch.Tensor) -> torch.Tensor:
        return torch.stack(self.ring.swap(self.rank, mine))

    def all_to_all(self, rows: torch.Tensor, coming: list[int], going: list[int]) -> torch.Tensor:
        assert sum(going) == len(rows)
        parts = [sent[self.rank] for sent in self.ring.swap(self.rank, torch.split(rows, going))]
        assert [len(part) for part in parts] == coming
        return torch.cat(parts)


def random_rows(rng: Any, experts: int, ranks: int) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in range(ranks)]
    for e in rng.permutation(experts).tolist():
        for g in rng.permutation(ranks)[: 1 + int(rng.integers(0, ranks) * (rng.random() < 0.5))]:
            rows[g].append(e)
    return rows


@pytest.mark.parametrize(("seed", "split"), [*((n, "host") for n in range(6)), (4, "device")])
def test_outputs_and_figures_of_several_ranks(seed: int, split: str) -> None:
    if split == "device":
        pytest.importorskip("triton")
    rng = np.random.default_rng(seed)
    ranks, experts, width = int(rng.integers(2, 5)), int(rng.integers(2, 7)), 5
    topk = int(rng.integers(1, min(experts, 3) + 1))
    ring = Ring(ranks, np.sort(rng.integers(0, 2, ranks)).tolist())
    first, then = (random_rows(rng, experts, ranks) for _ in range(2))
    if seed == 0:
        first = [sorted(row) for row in first]
    block = int(rng.choice([1, 4]))
    policy = share_policy(str(rng.choice(["balanced", "equal"])))
    weight = torch.from_numpy(rng.normal(size=(experts, width, width)))
    batches = []
    for _ in range(4):
        batch = []
        for _ in range(ranks):
            tokens = int(rng.integers(0, 12))
            chosen = np.zeros((tokens, topk), dtype=np.int64)
            for t in range(tokens):
                chosen[t] = np.sort(rng.permutation(experts)[:topk])
            if rng.random() < 0.5 and tokens:  # a token of fewer experts
                chosen[0, -1] = experts
            mask = None if rng.random() < 0.5 else torch.from_numpy(rng.random(tokens) < 0.7)
            batch.append(
                (
                    torch.from_numpy(rng.normal(size=(tokens, width))),
                    torch.from_numpy(chosen),
                    torch.from_numpy(rng.random((tokens, topk))),
                    mask,
                    bool(rng.random() < 0.5),
                )
            )
        batches.append(batch)
    heard: list[list[Any]] = [[] for _ in range(ranks)]

    def work(rank: int) -> list[torch.Tensor]:
        core: SlotDispatcher

        def agree(index: int, headers_RK: np.ndarray) -> None:
            assert index == 3
            heard[rank].append(headers_RK.tolist())
            if headers_RK[:, 0].min() == 2:  # from the third batch on: the next placement
                core.set_table(SlotTable(rows_to_slots(then), experts))

        clock = iter(range(10**6))
        seen = []
        core = SlotDispatcher(
            3,
            experts,
            topk,
            SlotTable(rows_to_slots(first), experts),
            Rank(ring, rank),  # type: ignore[arg-type]
            policy,
            row_block=block,
            header=lambda index: (len(heard[rank]), 10 * index + rank),
            agree=agree,
        )
        core.split_on(split)
        core.experts_watch.clock = lambda: float(next(clock))
        core.on_batch.append(lambda one, chosen: seen.append((one is core, chosen.shape[0])))
        found, done, began = [], 0, time.perf_counter()
        observed = torch.zeros(experts, dtype=torch.int64)
        for number, batch in enumerate(batches):
            x, chosen, prob, mask, skip = batch[rank]
            core.valid, core.skip_invalid = mask, skip
            rows, probs = core.send(*core.prepare(x, chosen, prob))
            assert core.local_experts == tuple((then if number >= 2 else first)[rank])
            rows, sizes, probs = core.sort_in(rows, probs)
            assert (sizes % block == 0).all()
            assert core.sends_RP.sum() == core.batch_counts_RE.sum()
            real = core.sends_RP[:, core.mine].sum(0)
            assert (sizes - real < block).all()
            done += int(real.sum())
            parts = torch.split(rows, sizes.tolist())
            made = [p @ weight[e] for p, e in zip(parts, core.local_experts, strict=False)]
            out = torch.cat([rows[:0], *made])
            found.append(core.combine(core.send_back(core.sort_out(out * probs[:, None]))))
            kept = chosen if mask is None else chosen[mask]
            observed += torch.bincount(kept.reshape(-1), minlength=experts + 1)[:experts]
        assert core.load_E is not None
        assert core.load_E.tolist() == observed.tolist()
        assert core.take_tokens() == done
        assert core.experts_watch.take() == len(batches)  # a tick each
        assert core.experts_watch.take() == 0.0
        assert 0 < core.layer_watch.take() <= time.perf_counter() - began
        assert seen == [(True, len(batch[rank][0])) for batch in batches]
        return found

    for rank, found in enumerate(ring.run(work)):
        for number, (got, batch) in enumerate(zip(found, batches, strict=True)):
            x, chosen, prob, mask, skip = batch[rank]
            want = torch.zeros_like(x)
            for t, k in np.ndindex(*chosen.shape):
                e = int(chosen[t, k])
                if e < experts and not (skip and mask is not None and not mask[t]):
                    want[t] += prob[t, k] * (x[t] @ weight[e])
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
            assert heard[rank][number] == [[number, 30 + r] for r in range(ranks)]


def test_quotas_that_lose_tokens_are_refused() -> None:
    class Loses:
        name = "loses"

        def quotas(self, index: int, load_E: Any, table: SlotTable) -> Any:
            return np.zeros(table.expert_P.size, dtype=np.int64)

    ring = Ring(2, [0, 0])
    policy: SharePolicy = Loses()

    def work(rank: int) -> str:
        group: Any = Rank(ring, rank)
        core = SlotDispatcher(0, 2, 1, SlotTable(rows_to_slots([[0, 1], [0]]), 2), group, policy)
        with pytest.raises(ProblemError, match="'loses' gave quotas that do not add up") as caught:
            core.prepare(torch.ones(1, 2), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))
        return str(caught.value)

    assert len(set(ring.run(work))) == 1


def some_table(rng: Any) -> tuple[SlotTable, np.ndarray]:
    ranks, experts = int(rng.integers(1, 6)), int(rng.integers(1, 7))
    table = SlotTable(rows_to_slots(random_rows(rng, experts, ranks)), experts)
    return table, rng.integers(0, 60, experts) * (rng.random(experts) < 0.8)


def test_equal_shares_differ_by_a_token_at_most_and_the_first_have_it() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        table, load = some_table(rng)
        quota = EqualShares().quotas(0, load, table)
        for e in range(table.experts):
            whole, rest = divmod(int(load[e]), int((table.expert_P == e).sum()))
            mine = quota[table.expert_P == e].tolist()
            assert mine == [whole + 1] * rest + [whole] * (len(mine) - rest)


def test_planned_shares_are_the_plans() -> None:
    rng = np.random.default_rng(1)
    for _ in range(100):
        table, load = some_table(rng)
        slots = rows_to_slots(table.rows)[None]
        known = rng.random(slots.shape) < 0.8  # the others were not there when it was planned
        share = rng.random(slots.shape) * (slots >= 0)
        policy = PlannedShares(share, np.where(known, slots, -1))
        quota = policy.quotas(0, load, table)
        for e in range(table.experts):
            at = np.flatnonzero(table.expert_P == e)
            parts = []
            for p in at:
                g = int(table.rank_P[p])
                c = table.rows[g].index(e)
                parts.append(float(share[0, g, c]) if known[0, g, c] else 0.0)
            if not sum(parts):
                parts = [1.0] * len(parts)
            exact = [load[e] * part / sum(parts) for part in parts]
            assert quota[at].sum() == load[e]
            assert all(abs(q - x) < 1 + 1e-6 for q, x in zip(quota[at], exact, strict=True))


def test_balanced_shares_are_as_level_as_ever() -> None:
    """Figures of 200 layers in all; they may fall."""
    rng = np.random.default_rng(2)
    top = top_speed = 0.0
    for _ in range(200):
        table, load = some_table(rng)
        quota = BalancedShares().quotas(0, load, table)
        assert (np.bincount(table.expert_P, weights=quota, minlength=table.experts) == load).all()
        top += np.bincount(table.rank_P, weights=quota, minlength=table.gpus).max()
        speed = rng.integers(1, 4, table.gpus)
        quota = BalancedShares(speed.tolist()).quotas(0, load, table)
        assert (np.bincount(table.expert_P, weights=quota, minlength=table.experts) == load).all()
        assert (quota >= 0).all()
        top_speed += (np.bincount(table.rank_P, weights=quota, minlength=table.gpus) / speed).max()
    assert top <= 9917
    assert top_speed <= 5852.6


def level(tokens: int, busy: list[int], speed: list[int]) -> float:
    """Least highest level of whole tokens: as low as the room below it holds them."""
    levels = sorted({(b + n) / s for b, s in zip(busy, speed, strict=True) for n in range(tokens + 1)})
    return next(
        x
        for x in levels
        if sum(max(0, int(x * s + 1e-9) - b) for b, s in zip(busy, speed, strict=True)) >= tokens
    )


def test_pouring_is_level_to_a_token() -> None:
    rng = np.random.default_rng(3)
    exact = even = 0
    for _ in range(400):
        n = int(rng.integers(1, 6))
        busy = rng.integers(0, 30, n).tolist()
        speed = [1] * n if rng.random() < 0.5 else rng.integers(1, 4, n).tolist()
        tokens = int(rng.integers(0, 40))
        parts = pour(tokens, busy, speed)
        assert sum(parts) == tokens
        assert min(parts) >= 0
        top = max((b + p) / s for b, p, s in zip(busy, parts, speed, strict=True) if p) if tokens else 0.0
        best = level(tokens, busy, speed) if tokens else 0.0
        if set(speed) == {1}:
            assert top == best
            even += 1
        assert top <= best + 1 / min(speed) + 1e-9
        exact += top <= best + 1e-9
    assert exact > 360
    # Ties go to the first.
    assert pour(1, [5, 5], [1, 1]) == [1, 0]
    assert pour(1, [5, 5, 5], [1, 1, 1]) == [1, 0, 0]
    assert pour(5, [2, 2, 2], [1, 1, 1]) == [2, 2, 1]
