"""Where home copies lie, and how much host memory they take."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from moeless_opt.problems.errors import ProblemError  # noqa: E402
from moeless_opt.runtime.live import home  # noqa: E402
from moeless_opt.runtime.live.home import NodeHome, PinnedHome  # noqa: E402


@pytest.mark.parametrize(("node_R", "experts"), [([0, 0, 1, 1], 8), ([0, 0, 0], 9), ([0, 1], 4), ([0], 3)])
def test_every_node_has_all_experts_once_and_not_where_they_serve(node_R: list[int], experts: int) -> None:
    ranks = tuple(10 + r for r in range(len(node_R)))
    homes = [
        NodeHome(SimpleNamespace(ranks=ranks, rank=r, node_R=tuple(node_R)), experts)  # type: ignore[arg-type]
        for r in range(len(ranks))
    ]
    for node in set(node_R):
        kept = sorted(e for r, at in enumerate(node_R) if at == node for e in homes[r].share)
        assert kept == list(range(experts))
    if len(set(node_R)) == 1 < len(node_R):
        for r, one in enumerate(homes):
            served = range(r * experts // len(node_R), (r + 1) * experts // len(node_R))
            assert not set(one.share) & set(served)
    for e in range(experts):
        assert homes[0].ranks(0, e) == [r for r in range(len(ranks)) if e in homes[r].share]
    homes[0].regroup(ranks[1:])
    for e in range(experts):
        assert homes[0].ranks(0, e) == [r - 1 for r in range(1, len(ranks)) if e in homes[r].share]
    homes[0].regroup(ranks)
    for e in homes[0].share:
        homes[0].put(0, e, [torch.full((2,), float(e))])
        assert homes[0].read(0, e)[0].tolist() == [float(e)] * 2


class Runtime:
    """CUDA's registration of host memory."""

    def __init__(self, code: int = 0) -> None:
        self.code, self.open, self.closed = code, {}, 0  # type: ignore[var-annotated]

    def cudaHostRegister(self, pointer: int, size: int, flags: int) -> int:
        self.open[pointer] = size
        return self.code

    def cudaHostUnregister(self, pointer: int) -> None:
        del self.open[pointer]
        self.closed += 1


@pytest.mark.parametrize("copies", [0, 1.5, "two", True])
def test_copies_are_a_whole_number(copies: Any) -> None:
    with pytest.raises(ProblemError, match="copies"):
        PinnedHome(copies)


def test_large_pinned_copies_take_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime()
    asked: list[Any] = []
    empty = torch.empty

    def counting(shape: Any, *, pin_memory: bool = False, **more: Any) -> Any:
        asked.append(pin_memory)
        return empty(shape, **more)

    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch, "empty", counting)
    large = empty(3, home.LARGE // 8)  # 1.5 times LARGE
    one = home._pinned(large)
    assert list(runtime.open.items()) == [(one.data_ptr(), large.numel() * 4)]
    assert asked == [False]
    del one
    assert runtime.open == {}
    assert runtime.closed == 1
    for like in (empty(2, home.LARGE // 4), empty(3)):  # nothing to gain
        asked.clear()
        assert home._pinned(like).shape == like.shape
        assert asked == [True]
    runtime.code = 2  # out of memory, or no right to lock it: torch's own then
    asked.clear()
    home._pinned(large)
    assert asked == [False, True]
