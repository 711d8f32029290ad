"""The compiled token split against the plain one."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
from moeless_opt.runtime.live.dispatch import routes, shares
from moeless_opt.runtime.live.dispatch.dispatcher import SlotDispatcher
from moeless_opt.runtime.live.slots import SlotTable, rows_to_slots


def some_layer(rng: np.random.Generator) -> tuple[SlotTable, np.ndarray, list[int]]:
    """Slots in any order, also ranks without any; counts, also none and big ones; nodes in any order."""
    experts, ranks = int(rng.integers(1, 24)), int(rng.integers(1, 14))
    rows: list[list[int]] = [[] for _ in range(ranks)]
    for e in rng.permutation(experts).tolist():
        n = 1 if rng.random() < 0.4 else int(rng.integers(1, ranks + 1))
        for g in rng.permutation(ranks)[:n].tolist():
            rows[g].append(e)
    high = 10 ** int(rng.integers(0, 9))
    counts = rng.integers(0, high, (ranks, experts + 3)) * (rng.random((ranks, experts + 3)) < 0.7)
    counts *= rng.random(experts + 3) < 0.9
    nodes = rng.integers(0, 3, ranks).tolist()
    # As it is gathered: a part of something wider.
    return SlotTable(rows_to_slots(rows), experts), counts[:, :experts], nodes


def policies(rng: np.random.Generator, table: SlotTable) -> list[shares.SharePolicy]:
    slots = table.slots()[None]
    known = np.where(rng.random(slots.shape) < 0.8, slots, -1)
    thirds = rng.integers(0, 4, slots.shape) / 3
    return [
        shares.EqualShares(),
        shares.PlannedShares(rng.random(slots.shape), known),
        shares.PlannedShares(thirds, slots),
        shares.BalancedShares(),
        shares.BalancedShares(rng.integers(1, 4, table.gpus).tolist(), sweeps=7),
        shares.BalancedShares(rng.integers(1, 10**12, table.gpus).tolist()),
    ]


def plainly(patch: pytest.MonkeyPatch) -> None:
    for module in (shares, routes):
        patch.setattr(module, "split_kernels", lambda: None)


def test_compiled_and_plain_splits_are_the_same_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    assert shares.warm_split()
    rng = np.random.default_rng(0)
    for _ in range(300):
        table, counts_RE, nodes = some_layer(rng)
        load_E = counts_RE.sum(axis=0)
        for policy in policies(rng, table):
            quota_P = policy.quotas(0, load_E, table)
            sends_RP = routes.source_aware(counts_RE, quota_P, table, nodes)
            with monkeypatch.context() as patch:
                plainly(patch)
                np.testing.assert_array_equal(quota_P, policy.quotas(0, load_E, table), policy.name)
                plain_RP = routes.source_aware(counts_RE, quota_P, table, nodes)
            np.testing.assert_array_equal(sends_RP, plain_RP, policy.name)
            assert sends_RP.dtype == plain_RP.dtype == quota_P.dtype == np.int64


def test_shares_that_sum_to_a_hair_above_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The floors, with their tolerance, can then hold more tokens than there are."""
    pytest.importorskip("numba")
    table = SlotTable([[0], [0], [0]], 1)
    met = 0
    for tokens in 3 * 10 ** np.arange(6, 13):
        load_E = np.array([tokens])
        # Just below whole thousands: the tolerance lifts each.
        share = np.array([1 - 2e-10, 1 - 2e-10, 1 + 4e-10]).reshape(1, 3, 1)
        policy = shares.PlannedShares(share, table.slots()[None])
        quota_P = policy.quotas(0, load_E, table)
        with monkeypatch.context() as patch:
            plainly(patch)
            np.testing.assert_array_equal(quota_P, policy.quotas(0, load_E, table))
        floors = np.floor(tokens * share.ravel() / 3 + 1e-9 * (1 + tokens * share.ravel() / 3))
        met += floors.sum() > tokens
        assert quota_P.sum() == tokens
    assert met


def test_read_only_and_narrow_counts_are_taken() -> None:
    table = SlotTable([[0, 1], [1, -1]], 2)
    load_E = np.array([3, 8], dtype=np.int32)
    load_E.flags.writeable = False
    counts_RE = np.broadcast_to(np.array([1, 4], dtype=np.int32), (2, 2))
    for policy in (shares.EqualShares(), shares.BalancedShares()):
        quota_P = policy.quotas(0, load_E, table)
        assert int(quota_P.sum()) == 11
        assert routes.source_aware(counts_RE, np.array([2, 4, 4]), table, [0, 0]).sum() == 10


def test_planned_weights_follow_the_table_in_force() -> None:
    policy = shares.PlannedShares(np.array([[[0.75], [0.25]]]), np.array([[[0], [0]]]))
    load_E = np.array([100])
    assert policy.quotas(0, load_E, SlotTable([[0], [0]], 1)).tolist() == [75, 25]
    assert policy.quotas(0, load_E, SlotTable([[0], [-1]], 1)).tolist() == [100]
    assert policy.quotas(0, load_E, SlotTable([[0], [0]], 1)).tolist() == [75, 25]


def test_nothing_is_compiled_after_a_dispatcher_is_made() -> None:
    """Importing compiles; the kernels then refuse other types instead of compiling for them."""
    pytest.importorskip("numba")
    from moeless_opt.runtime.live.dispatch import _kernels

    table = SlotTable([[0], [0]], 1)
    group: Any = type("Group", (), {"size": 2, "rank": 0, "node_R": [0, 0]})()
    SlotDispatcher(0, 1, 1, table, group, shares.BalancedShares())
    for name in _kernels.__all__:
        kernel = getattr(_kernels, name)
        assert len(kernel.signatures) == 1
        with pytest.raises(TypeError):
            kernel(*(["a"] * len(kernel.signatures[0])))


def test_compiled_kernels_are_loaded_when_first_wanted() -> None:
    code = (
        "import sys, moeless_opt.runtime.live.dispatch.shares as s; assert 'numba' not in sys.modules;"
        "assert s.warm_split() == ('numba' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
