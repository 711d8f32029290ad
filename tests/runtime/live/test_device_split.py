"""The split's kernels beside the host's split: the same integers; and compiled for a GPU that is not here."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
import torch

from moeless_opt.problems.errors import ProblemError, UnsupportedFeatureError
from moeless_opt.problems.spec import TimeModel
from moeless_opt.runtime.live import AttachOptions
from moeless_opt.runtime.live.dispatch import TimedShares, device, routes, shares
from moeless_opt.runtime.live.dispatch.dispatcher import SlotDispatcher
from moeless_opt.runtime.live.slots import SlotTable, rows_to_slots, static_slots

CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def policies(rng: np.random.Generator, table: SlotTable) -> list[shares.SharePolicy]:
    slots = table.slots()[None]
    known = np.where(rng.random(slots.shape) < 0.8, slots, -1)
    return [
        shares.EqualShares(),
        shares.PlannedShares(rng.random(slots.shape), known),
        shares.PlannedShares(rng.integers(0, 4, slots.shape) / 3, slots),
        shares.BalancedShares(),
        shares.BalancedShares(rng.integers(1, 4, table.gpus).tolist(), sweeps=7),
    ]


def same(
    table: SlotTable,
    counts_RE: np.ndarray,
    nodes: list[int],
    policy: shares.SharePolicy,
    me: int,
    extra: int = 3,
) -> None:
    """Kernels and host agree on everything that a split says."""
    ranks = len(counts_RE)
    group: Any = SimpleNamespace(size=ranks, rank=me, node_R=nodes)
    headers = np.arange(ranks * extra).reshape(ranks, extra) - 5
    gathered = torch.from_numpy(np.concatenate([counts_RE, headers], axis=1))
    quota_P = policy.quotas(0, counts_RE.sum(axis=0), table)
    sends_RP = routes.source_aware(counts_RE, quota_P, table, nodes)
    split = device.DeviceSplit(0, CPU)
    split.start(gathered, policy, table, group)
    np.testing.assert_array_equal(split.sends_RP.numpy(), sends_RP, policy.name)
    told = split.tell(gathered)
    own = slice(int(table.starts_G[me]), int(table.ends_G[me]))
    np.testing.assert_array_equal(told.headers_RK, headers)
    np.testing.assert_array_equal(told.chunks_RS, sends_RP[:, own])
    np.testing.assert_array_equal(told.come_R, sends_RP[:, own].sum(axis=1))
    by_rank = [sends_RP[me, a:b].sum() for a, b in zip(table.starts_G, table.ends_G, strict=True)]
    np.testing.assert_array_equal(told.give_R, by_rank)


def some_layer(rng: np.random.Generator, most: int) -> tuple[SlotTable, np.ndarray, list[int]]:
    """Slots in any order, ranks without slots or tokens, experts without tokens, nodes in any order."""
    experts, ranks = int(rng.integers(1, most)), int(rng.integers(1, most))
    rows: list[list[int]] = [[] for _ in range(ranks)]
    for e in rng.permutation(experts).tolist():
        n = 1 if rng.random() < 0.4 else int(rng.integers(1, ranks + 1))
        for g in rng.permutation(ranks)[:n].tolist():
            rows[g].append(e)
    high = 10 ** int(rng.integers(0, 6))
    counts = rng.integers(0, high, (ranks, experts)) * (rng.random((ranks, experts)) < 0.7)
    counts *= (rng.random(experts) < 0.9) * (rng.random((ranks, 1)) < 0.9)
    return SlotTable(rows_to_slots(rows), experts), counts, rng.integers(0, 3, ranks).tolist()


@needs_triton
def test_kernels_give_the_integers_of_the_host() -> None:
    rng = np.random.default_rng(5)
    for _ in range(8):
        table, counts_RE, nodes = some_layer(rng, 9)
        for policy in policies(rng, table):
            assert device.on_device(policy)
            same(table, counts_RE, nodes, policy, int(rng.integers(len(nodes))))


CURVE = TimeModel(
    curve_tokens=np.array([1.0, 8, 64, 512, 2048]),
    curve_activated=np.array([1.0, 3.0]),
    curve_time=np.array([[30.0, 60], [31, 61], [40, 66], [90, 110], [300, 310]]),
)


@needs_triton
def test_kernels_search_as_the_host_does() -> None:
    rng = np.random.default_rng(8)
    for number in range(3):
        table, counts_RE, nodes = some_layer(rng, 6)
        time = CURVE if number % 2 else TimeModel(token_cost=1.0, activation_cost=20.0)
        speed_G = rng.uniform(0.5, 1.5, len(nodes)) if number == 0 else None
        policy = TimedShares(time, per_token=0.1, speed_G=speed_G, kicks=1)
        assert device.on_device(policy)
        same(table, counts_RE, nodes, policy, 0)


def wide(experts: int, ranks: int, more: int) -> tuple[SlotTable, np.ndarray, list[int]]:
    """A layer of a large model, the heaviest experts with a replica more."""
    rng = np.random.default_rng(experts + ranks)
    load_E = rng.lognormal(0, 1, experts)
    rows = [row.tolist() for row in np.array_split(rng.permutation(experts), ranks)]
    for e in np.argsort(-load_E)[:more].tolist():
        open_to = [g for g in range(ranks) if e not in rows[g]]
        rows[min(open_to, key=lambda g: len(rows[g]))].append(e)
    counts = rng.multinomial(500, load_E / load_E.sum(), size=ranks)
    return SlotTable(rows_to_slots(rows), experts), counts, [r // 8 for r in range(ranks)]


@needs_triton
def test_a_policy_outlives_a_group() -> None:
    split, policy = device.DeviceSplit(0, CPU), shares.BalancedShares()
    for ranks in (3, 2, 8):
        table = SlotTable([[0, 1, 2]] * ranks, 3)
        counts_RE = np.random.default_rng(ranks).integers(0, 999, (ranks, 3))
        group: Any = SimpleNamespace(size=ranks, rank=0, node_R=[0] * ranks)
        split.start(torch.from_numpy(counts_RE), policy, table, group)
        quota_P = policy.quotas(0, counts_RE.sum(axis=0), table)
        want_RP = routes.source_aware(counts_RE, quota_P, table, group.node_R)
        np.testing.assert_array_equal(split.sends_RP.numpy(), want_RP)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("shape", [(64, 8, 8), (256, 64, 64)])
def test_large_layers(shape: tuple[int, int, int]) -> None:
    table, counts_RE, nodes = wide(*shape)
    same(table, counts_RE, nodes, shares.BalancedShares(), len(nodes) // 2)


@needs_triton
@pytest.mark.parametrize("name", ["equal", "balanced"])
def test_smallest_layers(name: str) -> None:
    policy = shares.share_policy(name)
    one = SlotTable([[0]], 1)
    same(one, np.array([[0]]), [0], policy, 0, extra=0)
    same(one, np.array([[7]]), [0], policy, 0)
    same(SlotTable(static_slots(6, 3), 6), np.zeros((3, 6), dtype=np.int64), [0, 0, 1], policy, 1)
    # One expert on all but a rank that has tokens and no slot.
    same(SlotTable([[0], [-1], [0]], 1), np.array([[5], [11], [0]]), [0, 1, 1], policy, 1)


@needs_triton
def test_rows_are_ordered_as_on_the_host() -> None:
    rng = np.random.default_rng(2)
    for _ in range(8):
        table, counts_RE, nodes = some_layer(rng, 6)
        counts_RE %= 30
        me, block = int(rng.integers(len(nodes))), int(rng.integers(1, 4))
        group: Any = SimpleNamespace(size=len(nodes), rank=me, node_R=nodes)
        split = device.DeviceSplit(0, CPU)
        split.start(torch.from_numpy(counts_RE), shares.EqualShares(), table, group)
        sends_RP = split.sends_RP.numpy()
        rows = torch.from_numpy(rng.permutation(int(sends_RP[me].sum())))
        # By expert, and there by slot: what the sorted rows are.
        expected: dict[int, list[int]] = {}
        at = 0
        for p in table.to_slots_P.tolist():
            expected[p] = rows[at : at + int(sends_RP[me, p])].tolist()
            at += int(sends_RP[me, p])
        back = torch.full((len(rows),), -7)
        by_slot = [row for p in sorted(expected) for row in expected[p]]
        assert split.by_slot(rows, back).tolist() == by_slot
        assert [by_slot.index(row) for row in range(len(rows))] == back.tolist()
        chunks_RS = sends_RP[:, int(table.starts_G[me]) : int(table.ends_G[me])]
        if not chunks_RS.size:
            continue
        wanted = rng.permutation(chunks_RS.shape[1])
        sizes_S = chunks_RS[:, wanted].sum(axis=0)
        padded = int((-(-sizes_S // block) * block).sum())
        gather, scatter = split.by_local_slot(wanted, int(sizes_S.sum()), padded, block)
        names = [(r, s, i) for r, row in enumerate(chunks_RS) for s, n in enumerate(row) for i in range(n)]
        # Slot by slot as wanted, there rank by rank; and filled up.
        target: list[Any] = []
        for s in wanted:
            target += sorted(name for name in names if name[1] == s)
            target += [None] * (-len(target) % block)
        assert len(target) == padded
        assert [t for t in target if t] == [
            names[g] for g, t in zip(gather.tolist(), target, strict=True) if t
        ]
        assert [target[s] for s in scatter.tolist()] == names


@needs_triton
@pytest.mark.parametrize(("wanted", "where"), [(None, "host"), ([1, 2, 0], "device")])
def test_one_rank_waits_for_nothing(
    wanted: list[int] | None, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With experts that take sizes on the device: shapes are known, and nothing is told to the host."""
    monkeypatch.setattr(device.DeviceSplit, "tell", None)
    group: Any = SimpleNamespace(
        size=1, rank=0, node_R=(0,), device=CPU, all_to_all=lambda rows, *_: rows, all_gather=None
    )
    heard = []
    core = SlotDispatcher(
        0,
        3,
        2,
        SlotTable([[2, 0, 1]], 3),
        group,
        shares.BalancedShares(),
        header=lambda _: (4, 2),
        agree=lambda index, told_RK: heard.append(told_RK.tolist()),
    )
    core.split_on("device")
    core.sizes_there = True
    core.slot_order = lambda: None if wanted is None else np.array(wanted)
    expert_Tk = torch.tensor([[0, 1], [1, 2], [0, 3], [0, 2]])
    core.valid, core.skip_invalid = torch.tensor([True, True, True, False]), True
    x, prob = torch.arange(1.0, 5.0)[:, None].double(), torch.rand(4, 2, dtype=torch.float64)
    rows, sizes, probs = core.sort_in(*core.send(*core.prepare(x, expert_Tk, prob)))
    assert isinstance(sizes, torch.Tensor)
    assert len(rows) == 8
    order = wanted or [0, 1, 2]
    assert sizes.tolist() == [[1, 2, 2][s] for s in order]
    made, at = torch.full_like(rows, np.nan), 0
    for slot, size in zip(order, sizes.tolist(), strict=True):
        made[at : at + size] = rows[at : at + size] * 10.0 ** [2, 0, 1][slot]
        at += size
    out = core.combine(core.send_back(core.sort_out(made * probs[:, None])))
    want = [1 * (prob[0, 0] + 10 * prob[0, 1]), 2 * (10 * prob[1, 0] + 100 * prob[1, 1]), 3 * prob[2, 0], 0.0]
    torch.testing.assert_close(out.ravel(), torch.tensor(want, dtype=torch.float64))
    assert heard == [[[4, 2]]]
    assert core.take_tokens() == 5
    assert core.take_tokens() == 0
    core.sort_in(*core.prepare(x, expert_Tk, prob))
    core.split_on(where)  # nothing is forgotten
    assert core.take_tokens() == 5
    assert core.batch_counts_RE.tolist() == [[2, 2, 1]]
    assert core.sends_RP.tolist() == [[1, 2, 2]]
    assert core.used_slots().tolist() == [3]


def test_where_splits_cannot_be_on_the_device_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not device.runs_here("host", CPU)
    assert not device.runs_here("auto", CPU)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UnsupportedFeatureError, match="split='device': triton is not installed"):
        device.runs_here("device", CPU)
    assert not device.runs_here("auto", torch.device("cuda"))


def test_the_option_is_checked() -> None:
    with pytest.raises(ProblemError, match="split: is 'gpu', must be 'auto', 'host' or 'device'"):
        AttachOptions(split="gpu")


def test_policies_without_kernels() -> None:
    class Mine(shares.BalancedShares):
        """Not what the kernels know."""

    assert not device.on_device(Mine())
    assert not device.on_device(shares.BalancedShares([2**31, 1]))
    assert device.on_device(shares.BalancedShares([3, 1]))
    assert device.on_device(TimedShares(CURVE, kicks=1000))
    assert not device.on_device(TimedShares(CURVE, kicks=2**31 - 1))  # each is a program and has room


COMPILE = """
from moeless_opt.runtime.live.dispatch.device import compiled

for name, sizes in {
    "split": dict(RB=8, X=2, NB=32, POLICY=1),
    "search": dict(GB=8, SB=8, X=2, NB=32, TRIES=8, STEPS=1000, LOG=1, UNIT=False),
}.items():
    found = compiled(name, **sizes)
    assert 0 < found.instructions, name
    assert found.spills < 20, name
    # Products and sums are rounded one by one, as on the host.
    assert "fma.rn.f64" not in found.ptx, name
    # What is added before floors is 1e-9 itself, not the nearest number of 32 bits.
    assert (name == "split") == ("0d3E112E0BE826D695" in found.ptx), name
"""


@needs_triton
@pytest.mark.slow
def test_kernels_compile_for_a_gpu_without_one() -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", COMPILE], check=True, env=env)
