"""What is read before it can be sent is read by a thread, and later mail waits behind it."""

from __future__ import annotations

import threading
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from moeless_opt.runtime.live.courier import LOST, OK, Courier  # noqa: E402


class Group:
    """Remembers what is posted, and by which thread."""

    device = torch.device("cpu")
    staged = False

    def __init__(self) -> None:
        self.posted: list[tuple[int, str]] = []

    def exchange(self, sends: Any, receives: Any) -> list[Any]:
        self.posted.append((int(sends[0][0].item()), threading.current_thread().name))
        return []


def letter(number: int) -> Any:
    return ([torch.tensor([number])], 0, 0)


def test_a_forward_pass_never_waits_for_a_disk_and_the_order_stays() -> None:
    group, disk = Group(), threading.Event()
    courier = Courier(group)  # type: ignore[arg-type]
    here = threading.current_thread().name

    def slow() -> Any:
        assert disk.wait(20.0)
        return [torch.tensor([1])]

    flights = [courier.post([mail], [], lambda: None) for mail in (letter(0), (slow, 0, 0), letter(2))]
    flights[0].done.wait(20.0)
    assert group.posted == [(0, here)]
    assert not flights[1].done.is_set()
    disk.set()
    for flight in flights:
        assert flight.done.wait(20.0)
        assert flight.fault == OK
    assert group.posted[1:] == [(1, "moeless-reader"), (2, "moeless-reader")]
    while courier._reading:
        pass
    last = courier.post([letter(3)], [], lambda: None)
    assert last.done.wait(20.0)
    assert group.posted[3] == (3, here)
    courier.close()
    assert courier.waits == 0


def test_whatever_a_reader_raises_is_heard_of() -> None:
    courier = Courier(Group())  # type: ignore[arg-type]

    def broken() -> Any:
        raise KeyError("gone")

    flight = courier.post([(broken, 0, 0)], [], lambda: None)
    assert flight.done.wait(20.0)
    assert (flight.fault, flight.error) == (LOST, "KeyError: 'gone'")
    after = courier.post([letter(1)], [], lambda: None)
    assert after.done.wait(20.0)
    assert after.fault == OK
    courier.close()
