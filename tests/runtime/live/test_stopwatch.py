"""Times on a GPU's own clock, with events that end when the test says so."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
import torch

from moeless_opt.runtime.live.dispatch import stopwatch
from moeless_opt.runtime.live.elastic import Elastic


class Event:
    """A point of a stream that the device reaches when `now` says so."""

    now = 0.0
    clock = 0.0

    def __init__(self) -> None:
        self.at = Event.clock = Event.clock + 1.0

    def query(self) -> bool:
        return self.at <= Event.now

    def synchronize(self) -> None:
        Event.now = max(Event.now, self.at)

    def elapsed_time(self, later: Event) -> float:
        assert later.query(), "the device is not there yet"
        return 1e3 * (later.at - self.at)


@pytest.fixture(autouse=True)
def _events(monkeypatch: pytest.MonkeyPatch) -> None:
    Event.now = Event.clock = 0.0
    monkeypatch.setattr(stopwatch, "mark", Event)


def test_only_what_is_over_is_read_and_nothing_waits() -> None:
    watch = stopwatch.Stopwatch()
    for _ in range(3):
        watch.start(True)
        watch.stop(True)
    assert watch.take() == 0.0
    assert not watch.over()
    Event.now = 4.0
    assert watch.take() == 2.0
    later = watch.take_spans()
    assert watch.over()
    assert not later.over()
    assert later.over(wait=True)
    assert (watch.take(), later.take()) == (0.0, 1.0)


def test_passes_are_charged_when_the_device_has_done_them() -> None:
    class Layer:
        group = SimpleNamespace(device=torch.device("cuda"))

        def __init__(self) -> None:
            self.layer_watch = stopwatch.Stopwatch()

        def used_slots(self) -> torch.Tensor:
            return torch.tensor([2])

    layers: Any = [Layer(), Layer()]
    elastic = Elastic(
        np.array([[[0, 1]], [[1, 0]]], dtype=np.int32),
        2,
        capacity_LG=np.full((2, 1), 2),
        bytes_L=np.array([10, 10]),
        keep_alive=1.0,
        clock="passes",
        dispatchers=layers,
    )
    charged: list[Any] = []
    elastic._meter.add_passes = lambda *parts: charged.append(parts)  # type: ignore[method-assign]
    for _ in range(2):
        elastic.begin_pass()
        for layer in layers:
            layer.layer_watch.start(True)
            layer.layer_watch.stop(True)
        elastic.end_pass()
    assert not charged  # the host is done, the device is not
    Event.now = 6.0
    elastic.begin_pass()
    assert len(charged) == 1
    _, used_BL, layer_BL, seconds_B, _, _ = charged[0]
    assert used_BL.tolist() == [[2.0, 2.0]]
    assert layer_BL.tolist() == [[1.0, 1.0]]
    assert seconds_B.tolist() == [5.0]
    assert elastic.meter is elastic._meter
    assert len(charged) == 2
