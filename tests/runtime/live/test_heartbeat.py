"""Signs of life, meetings in the store, and what is NCCL's own, without processes."""

from __future__ import annotations

import ast
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
dist = pytest.importorskip("torch.distributed")

from moeless_opt.problems.errors import MoelessError, ProblemError  # noqa: E402
from moeless_opt.runtime.live import ExpertGroup, nccl  # noqa: E402
from moeless_opt.runtime.live.groups import RankLostError  # noqa: E402
from moeless_opt.runtime.live.heartbeat import Heartbeat  # noqa: E402
from moeless_opt.runtime.live.meeting import EvictedError, Meeting  # noqa: E402
from moeless_opt.runtime.live.repair import spread_slots  # noqa: E402

DEAD = 0.4


def until(true: Any) -> None:
    """Wait for a thread's work."""
    deadline = time.monotonic() + 20.0
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def hearts() -> Iterator[list[Heartbeat]]:
    """Of two ranks that listen to each other."""
    store = dist.HashStore()
    made = [Heartbeat(store, "test", rank, DEAD) for rank in range(2)]
    for heart in made:
        heart.follow({0: 0, 1: 0})
    yield made
    for heart in made:
        heart.stop()


def test_a_rank_whose_heart_stops_is_told_of_once(hearts: list[Heartbeat]) -> None:
    told: list[str] = []
    hearts[0].on_loss = lambda: told.append(hearts[0].news)
    time.sleep(3 * DEAD)
    assert hearts[0].news == hearts[1].news == ""
    hearts[1]._stop.set()  # without a word
    until(lambda: hearts[0].news)
    assert hearts[0].news == f"rank 1 has given no sign of life for {DEAD:g} s"
    assert hearts[0].silent(1) > DEAD
    time.sleep(DEAD)
    assert told == [hearts[0].news]
    hearts[0].follow({0: 0})
    time.sleep(DEAD)
    assert hearts[0].news == ""


def test_who_leaves_says_so(hearts: list[Heartbeat]) -> None:
    hearts[1].stop("no memory")
    assert hearts[0].heard() == hearts[0].news == "rank 1 has left: no memory"
    assert hearts[0].silent(1) == float("inf")


def test_an_alarm_reaches_all_but_those_who_know(hearts: list[Heartbeat]) -> None:
    hearts[1].follow({0: 0, 1: 0}, epoch=2)
    hearts[1].alarm(2)
    until(lambda: hearts[0].news)
    assert hearts[0].news == "another rank has lost one"
    time.sleep(DEAD)
    assert hearts[1].news == ""


def test_an_alarm_that_all_give_at_once_rings_for_one_meeting(hearts: list[Heartbeat]) -> None:
    for epoch in range(1, 30):
        threads = [threading.Thread(target=heart.alarm, args=(epoch,)) for heart in hearts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert hearts[0]._store.add("test/alarm", 0) == epoch


def test_the_own_pause_is_nobody_elses_silence(hearts: list[Heartbeat]) -> None:
    # Its thread stands still for longer than a rank may be silent, and its neighbour's counter, too, did not
    # move meanwhile: as when a whole machine slept.
    with hearts[0]._lock, hearts[1]._lock:
        time.sleep(3 * DEAD)
    time.sleep(0.5 * DEAD)
    assert hearts[0].news == hearts[1].news == ""


def test_a_store_that_is_gone_makes_deaf_and_nobody_dead(hearts: list[Heartbeat]) -> None:
    class Gone:
        def set(self, *_: Any) -> None:
            raise RuntimeError("Connection refused")

    hearts[0]._store = Gone()
    until(lambda: hearts[0].deaf)
    assert hearts[0].deaf == "the store is gone: Connection refused"
    assert hearts[0].news == ""


def meet(meetings: list[Meeting], epoch: int, crew: dict[int, int]) -> list[Any]:
    """All of them at once; lists, or errors."""
    found: list[Any] = [None] * len(meetings)

    def go(i: int) -> None:
        try:
            found[i] = meetings[i].gather(epoch, crew)
        except MoelessError as error:
            found[i] = error

    threads = [threading.Thread(target=go, args=(i,)) for i in range(len(meetings))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def group_of(store: Any, rank: int, heart: Heartbeat | None) -> ExpertGroup:
    """As a group looks to a meeting."""
    made = ExpertGroup((0, 1, 2), rank, torch.device("cpu"), 20.0, store, name="1", meet=0)
    made.heart, made.outside = heart, False
    return made


def test_a_meeting_waits_for_who_lives_and_not_for_who_is_silent() -> None:
    store = dist.HashStore()
    name = "moeless/0-1-2/1"
    hearts = [Heartbeat(store, name, rank, DEAD) for rank in range(3)]
    for heart in hearts:
        heart.follow(dict.fromkeys(range(3), 0))
    meetings = [Meeting(group_of(store, rank, hearts[rank]), grace=DEAD) for rank in range(3)]
    crew = dict.fromkeys(range(3), 0)
    late: list[Any] = []

    def busy() -> None:
        time.sleep(4 * DEAD)  # its heart beats on
        late.append(meetings[2].gather(1, crew))

    thread = threading.Thread(target=busy)
    thread.start()
    assert meet(meetings[:2], 1, crew) == [crew, crew]
    thread.join()
    assert late == [crew]
    hearts[2]._stop.set()
    assert meet(meetings[:2], 2, crew) == [{0: 0, 1: 0}] * 2
    with pytest.raises(EvictedError, match=r"rank 2 came too late: ranks \[0, 1\] went on"):
        meetings[2].gather(2, crew)
    # Another process takes its rank, asks to be let in, and comes to the next meeting.
    back = Meeting(ExpertGroup.create((0, 1, 2), join=2, store=store, timeout=20.0), grace=DEAD)
    invited: list[Any] = []
    thread = threading.Thread(target=lambda: invited.append(back.knock(DEAD)))
    thread.start()
    until(lambda: hearts[0].knocks == 1 == hearts[1].knocks)
    guests = [meetings[rank].invite(3, {0: 0, 1: 0}) for rank in range(2)]
    thread.join()
    assert guests == [{2: 1}, {2: 1}]
    assert (invited[0].epoch, invited[0].crew) == (3, {0: 0, 1: 0})
    with_it = {0: 0, 1: 0, 2: 1}
    assert meet([*meetings[:2], back], 3, with_it) == [with_it] * 3
    assert meetings[0].invite(4, with_it) == {}
    for heart in (*hearts, back.heart):
        assert heart is not None
        heart.stop()


def test_nobody_lets_in_who_knocks_at_an_empty_house() -> None:
    group = ExpertGroup.create((0, 1), join=1, store=dist.HashStore(), timeout=0.2)
    with pytest.raises(MoelessError, match=r"rank 1 was not let in again within 0\.2 s"):
        Meeting(group, 1.0).knock(DEAD)
    with pytest.raises(RankLostError, match="outside the group"):
        group.gather_ints([1])
    with pytest.raises(ProblemError, match="join: is 5"):
        ExpertGroup.create((0, 1), join=5, store=dist.HashStore())


@pytest.mark.parametrize("seed", range(6))
def test_ranks_that_come_back_get_their_part(seed: int) -> None:
    rng = np.random.default_rng(seed)
    experts, gpus = int(rng.integers(1, 20)), int(rng.integers(2, 6))
    new = sorted(rng.permutation(gpus)[: int(rng.integers(1, gpus))].tolist())
    old = [g for g in range(gpus) if g not in new]
    slots_LGC = np.full((2, gpus, experts), -1, dtype=np.int32)
    for layer in range(2):
        for e in range(experts):
            for g in rng.permutation(old)[: int(rng.integers(1, len(old) + 1))]:
                slots_LGC[layer, g, e] = e
    load = rng.integers(0, 50, (2, experts)).astype(float)
    capacity = np.full((2, gpus), experts)
    found = spread_slots(slots_LGC, experts, capacity, new, load)

    def fullest(slots_GC: Any, load_E: Any) -> float:
        held = [[e for e in row.tolist() if e >= 0] for row in slots_GC]
        count = np.bincount([e for row in held for e in row], minlength=experts)
        assert (count > 0).all()
        assert all(len(set(row)) == len(row) for row in held)
        return max(sum(load_E[e] / count[e] for e in row) for row in held)

    for layer in range(2):
        before, after = fullest(slots_LGC[layer], load[layer]), fullest(found[layer], load[layer])
        assert after <= before * (1 + 1e-9)
        assert (found[layer] >= 0).sum() == (slots_LGC[layer] >= 0).sum()
        if experts >= 4 * gpus:
            assert all((found[layer, g] >= 0).any() for g in new)
    none = spread_slots(slots_LGC, experts, np.where(np.isin(np.arange(gpus), new), 0, capacity), new, load)
    assert not (none[:, new] >= 0).any()


# -- NCCL ------------------------------------------------------------------------------------------


class FakeDevice:
    """A tensor on a device that answers when its communicator is aborted."""

    is_cuda = True

    def __init__(self) -> None:
        self.aborted = threading.Event()

    def cpu(self) -> Any:
        assert self.aborted.wait(20.0)
        return torch.zeros(1)


def test_an_abort_ends_the_wait_for_a_device_and_the_check_behind_it_tells(hearts: list[Heartbeat]) -> None:
    group = group_of(None, 0, hearts[0])
    there, answers = FakeDevice(), FakeDevice()
    answers.aborted.set()
    assert group.to_host(answers).tolist() == [0.0]  # type: ignore[arg-type]
    hearts[0].on_loss = there.aborted.set
    hearts[1].stop()
    with pytest.raises(RankLostError, match="rank 1 has left"):
        group.to_host(there)  # type: ignore[arg-type]


def test_a_device_that_never_answers_is_given_up_though_all_live(hearts: list[Heartbeat]) -> None:
    group = group_of(None, 0, hearts[0])
    group.timeout = 0.2
    there = FakeDevice()
    hearts[0].on_loss = there.aborted.set
    with pytest.raises(RankLostError, match=r"no answer from the device within 0\.2 s, though all ranks"):
        group.to_host(there)  # type: ignore[arg-type]


class FakeGroup:
    """What `nccl` does with a group."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls: list[str] = []
        self.error = error

    def _start_coalescing(self, device: Any) -> None:
        self.calls.append("start")

    def _end_coalescing(self, device: Any) -> str:
        self.calls.append("end")
        return "work"

    def send(self, *_: Any) -> None:
        self.calls.append("send")
        if self.error is not None:
            raise self.error

    def recv(self, *_: Any) -> None:
        self.calls.append("recv")


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (None, None),
        (RuntimeError("NCCL communicator was aborted"), RankLostError),
        (torch.OutOfMemoryError("CUDA out of memory"), MemoryError),
    ],
)
def test_a_batch_is_closed_whatever_happens_in_it(error: Exception | None, seen: type | None) -> None:
    """And lack of memory, which is a RuntimeError, is not taken for the loss of a rank."""
    group, inner = group_of(None, 0, None), FakeGroup(error)
    group.device, group._weights = torch.device("cuda"), inner
    x = torch.zeros(2)
    if seen is None:
        assert group.exchange([(x, 1, 0)], [(x, 1, 0)]) == ["work"]
        assert inner.calls == ["start", "send", "recv", "end"]
    else:
        with pytest.raises(seen):
            group.exchange([(x, 1, 0)], [(x, 1, 0)])
        assert inner.calls == ["start", "send", "end"]


def test_our_communicators_end_no_process_and_the_environment_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, str | None] = {}

    class Fake:
        class Options:
            pass

        def __init__(self, *_: Any) -> None:
            seen.update({name: os.environ.get(name) for name in nccl.ENVIRONMENT})

    monkeypatch.setattr(dist, "ProcessGroupNCCL", Fake, raising=False)
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3")
    monkeypatch.delenv("TORCH_NCCL_ENABLE_MONITORING", raising=False)
    nccl.make(None, 0, 2, 5.0)
    assert seen == nccl.ENVIRONMENT
    assert seen["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "0"
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "3"
    assert "TORCH_NCCL_ENABLE_MONITORING" not in os.environ


def test_what_is_called_of_nccl_is_in_torchs_signatures() -> None:
    """This torch may have no NCCL; its stub tells the signatures all the same."""
    stub = Path(torch.__file__).parent / "_C" / "_distributed_c10d.pyi"
    tree = ast.parse(stub.read_text(encoding="utf-8"))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}

    def arguments(where: ast.ClassDef, name: str) -> list[str]:
        (found, *_) = (n for n in where.body if isinstance(n, ast.FunctionDef) and n.name == name)
        return [a.arg for a in found.args.args]

    backend, group = classes["ProcessGroupNCCL"], classes["ProcessGroup"]
    assert arguments(backend, "__init__") == ["self", "store", "rank", "size", "options"]
    (options,) = (n for n in backend.body if isinstance(n, ast.ClassDef) and n.name == "Options")
    assert arguments(options, "__init__")[0] == "self"
    assert arguments(group, "abort") == ["self"]
    (base,) = (n for n in classes["Backend"].body if isinstance(n, ast.ClassDef) and n.name == "Options")
    assert arguments(base, "_timeout") == ["self"]
    for name in ("_start_coalescing", "_end_coalescing"):
        assert hasattr(dist.ProcessGroup, name)
