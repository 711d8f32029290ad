"""Measured curves of experts."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from moeless_opt.problems.errors import ProblemError  # noqa: E402
from moeless_opt.runtime.live.measure import in_turn, measure_experts  # noqa: E402


class Clockwork:
    """A clock that experts move: 2 s per call and 1 s per row, and each call later than the last."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[list[int]] = []

    def run(self, rows: torch.Tensor, sizes: np.ndarray) -> None:
        assert rows.shape == (sizes.sum(), 8)
        self.calls.append(sizes.tolist())
        self.now += 2.0 * len(sizes) + len(rows)

    def __call__(self) -> float:
        return self.now


def test_the_curve_is_what_the_clock_says() -> None:
    works = Clockwork()
    time = measure_experts(works.run, 8, activated=(1, 2, 4), tokens=(4, 10, 30), repeats=3, clock=works)
    assert time.unit == "s"
    for tokens, active in itertools.product((4, 10, 30), (1, 2, 4)):
        assert time.time(tokens, active, 1.0) == 2.0 * active + tokens
    assert time.time(20, 3, 1.0) == 26.0  # between the points
    assert [3, 3, 2, 2] in works.calls  # spread evenly
    assert len(works.calls) == 4 * 9  # and once to warm up


def test_one_after_the_other_and_bad_grids() -> None:
    seen: list[tuple[int, int]] = []
    experts = [lambda x, i=i: seen.append((i, len(x))) for i in range(3)]
    measure_experts(in_turn(experts), 4, activated=(1, 3), tokens=(3, 6), repeats=1)
    assert {(0, 6), (0, 2), (1, 2), (2, 2), (2, 1)} <= set(seen)
    for bad in ((4,), (4, 4), (8, 4)):
        with pytest.raises(ProblemError, match="tokens"):
            measure_experts(in_turn(experts), 4, activated=(1, 2), tokens=bad)
    for share in (2, -1, float("nan")):
        with pytest.raises(ProblemError, match="quantile"):
            measure_experts(in_turn(experts), 4, activated=(1, 2), tokens=(3, 6), quantile=share)


def test_caches_are_cold_at_every_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """From warm caches one more expert looked too cheap, and balance worth more than it is."""
    from moeless_opt.runtime.live import measure

    works, between, seen = Clockwork(), [], []
    monkeypatch.setattr(measure, "_cool", lambda other: between.append(len(other)))
    for flush in (None, 5, 0):
        measure_experts(
            lambda rows, sizes: seen.append(len(between)), 8, activated=(1, 2), tokens=(4, 10), repeats=1,
            clock=works, flush=flush,
        )  # fmt: skip
    assert seen == list(range(1, 25))  # once before each
    assert between == [2 * measure.CORE_CACHE] * 8 + [5] * 8 + [0] * 8
    with pytest.raises(ProblemError, match="flush"):
        measure_experts(works.run, 8, activated=(1, 2), tokens=(4, 10), flush=-1)


def test_rows_are_padded_as_in_a_pass() -> None:
    """One row of a block of 16 was timed as one, and decode looked cheaper the fewer rows an expert had."""
    from moeless_opt.runtime.live.watch import measure

    seen: list[tuple[int, list[int]]] = []
    bank = SimpleNamespace(order=(0, 1, 2), shapes=[((4, 8), torch.float32)])
    adopted = SimpleNamespace(
        banks=[bank], hidden=8, run_experts=lambda i, rows, sizes: seen.append((len(rows), sizes.tolist()))
    )
    group = SimpleNamespace(gather_ints=lambda values: [values], device=torch.device("cpu"), size=1)
    time = measure(adopted, group, [0], [1, 20], repeats=1, flush=0, row_block=16)  # type: ignore[arg-type]
    assert time.curve_tokens is not None
    assert time.curve_tokens.tolist() == [1, 20]
    assert set(map(str, seen)) == set(
        map(str, [(16, [16, 0, 0]), (32, [32, 0, 0]), (32, [16, 16, 0]), (48, [16, 16, 16])])
    )
    seen.clear()
    measure(adopted, group, [0], [1, 20], repeats=1, flush=0)  # type: ignore[arg-type]
    assert (20, [10, 10, 0]) in seen


def test_real_experts_take_longer_for_more() -> None:
    weights = [torch.randn(256, 256) for _ in range(2)]
    time = measure_experts(
        in_turn([lambda x, w=w: x @ w for w in weights]), 256, activated=(1, 2), tokens=(8, 2048), repeats=5
    )
    assert time.time(2048, 1, 1.0) > time.time(8, 1, 1.0) > 0


def test_one_queue_for_all_streams_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from moeless_opt.runtime.live.watch import note_queues

    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    note_queues(torch.device("cpu"))
    with pytest.warns(RuntimeWarning, match="CUDA_DEVICE_MAX_CONNECTIONS is 1: all streams share one queue"):
        note_queues(torch.device("cuda"))
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    note_queues(torch.device("cuda"))


def test_layers_are_timed_in_turn_as_a_pass_reads_them() -> None:
    """One layer's experts alone would stay in caches that all layers share."""
    from moeless_opt.runtime.live.watch import measure

    ran: list[tuple[int, int]] = []
    held = (4, 3, 1, 3)  # one layer holds too few to compare
    banks = [SimpleNamespace(order=list(range(x)), shapes=[((4, 4), torch.float32)]) for x in held]
    adopted = SimpleNamespace(
        banks=banks, hidden=4, run_experts=lambda index, rows, sizes: ran.append((index, len(sizes)))
    )
    group = SimpleNamespace(device=torch.device("cpu"), size=1, gather_ints=lambda row: [row])
    found = measure(adopted, group, [0, 1, 2, 3], [1, 4], repeats=2, flush=0)  # type: ignore[arg-type]
    assert found.curve_activated is not None
    assert found.curve_activated.tolist() == [1, 2, 3]  # as many as each of the others has here
    assert ran == [((0, 1, 3)[x % 3], held[(0, 1, 3)[x % 3]]) for x in range(3 * 6)]
    ran.clear()
    measure(adopted, group, [0], [1, 4], repeats=1, flush=0)  # type: ignore[arg-type]
    assert set(ran) == {(0, 4)}
