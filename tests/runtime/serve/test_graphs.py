"""Decode passes in recorded pieces, beside passes that run as they come.

CUDA graphs need a GPU. What stands for them here runs the recorded function again, in a thread that stops
where a piece ends, and writes into the tensors of the recording: sizes, padding, masks and the experts
between the pieces are those of a GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("megatron.core")

from moeless_opt.runtime.engines.attach import attach  # noqa: E402
from moeless_opt.runtime.engines.recorder import EndPiece  # noqa: E402
from moeless_opt.runtime.serve.engine import graphs as room  # noqa: E402
from moeless_opt.runtime.serve.engine.paged import KvPool, PagedModel, PassRows  # noqa: E402
from moeless_opt.runtime.tiny_moe import model as tiny  # noqa: E402

BLOCK = 4


class Again:
    """Pieces that compute: a thread runs the function, and waits between them."""

    def __init__(self) -> None:
        self.made = 0

    def record(self, call: Callable[[EndPiece], Any]) -> tuple[list[Callable[[], None]], Any]:
        self.made += 1
        kept: list[tuple[tuple[Any, ...], Any]] = []

        def keep(outputs: tuple[Any, ...], made: Any) -> Any:
            kept.append((outputs, made.zero_()))
            return made

        result = call(keep)
        turn, back = threading.Semaphore(0), threading.Semaphore(0)
        thread: list[threading.Thread] = []

        @torch.no_grad()
        def run() -> None:
            at = iter(kept)

            def cut(outputs: tuple[Any, ...], _made: Any) -> Any:
                old, made = next(at)
                for a, b in zip(old, outputs, strict=True):
                    a.copy_(b)
                back.release()
                turn.acquire()
                return made

            result.copy_(call(cut))
            back.release()

        def piece() -> None:
            if not thread:
                thread.append(threading.Thread(target=run))
                thread[0].start()
            else:
                turn.release()
            back.acquire()
            if last():
                thread.pop().join()

        count = [0]

        def last() -> bool:
            count[0] = (count[0] + 1) % (len(kept) + 1)
            return count[0] == 0

        return [piece] * (len(kept) + 1), result


def rows_of(places: list[int], tokens: list[int]) -> PassRows:
    """One token of each request; a request has the same blocks in every pass."""
    count, widest = len(places), 4
    blocks_RB = np.arange(count * widest).reshape(count, widest)[:, ::-1].copy()
    place_T = np.array(places)
    slot_T = blocks_RB[np.arange(count), place_T // BLOCK] * BLOCK + place_T % BLOCK
    ones = np.ones(count, dtype=np.int64)
    return PassRows(np.array(tokens), place_T, slot_T, np.arange(count), ones, blocks_RB, np.arange(count))


@pytest.fixture
def paged() -> PagedModel:
    model = tiny.load()
    pool = KvPool(64, BLOCK, torch.float32, torch.device("cpu"))
    made = PagedModel(model, pool, 64)
    made.live = attach(model, experts="grouped")  # type: ignore[attr-defined]
    return made


@pytest.mark.parametrize("count", [1, 3, 9])
def test_recorded_passes_give_the_same_logits_and_loads(paged: PagedModel, count: int) -> None:
    rng = np.random.default_rng(count)
    live: Any = paged.live  # type: ignore[attr-defined]
    recorder = Again()
    seen: list[list[Any]] = []
    # Lengths of blocks change under the same recording, and plans come into force between its pieces.
    starts = rng.integers(0, 5, count).tolist()
    for recorded in (False, True):
        if recorded:
            paged.record(recorder)
        for layer in paged.pool._layers.values():
            for tensor in layer:
                tensor.zero_()
        live.observe()
        found = []
        draws = np.random.default_rng(count + 50)
        for step in range(6):
            places = [start + step for start in starts]
            tokens = draws.integers(0, 200, count).tolist()
            found.append(paged.forward(rows_of(places, tokens)).clone())
            if step == 3:
                live.apply(live.slots_LGC[:, :, ::-1].copy())
        live.settle()
        found.append(torch.from_numpy(live.observe().load_LE))
        seen.append(found)
    assert paged.graphs is not None
    assert paged.graphs.passes >= 2
    assert recorder.made >= 1
    for a, b in zip(*seen, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_recorded_runs_as_it_comes(paged: PagedModel) -> None:
    recorder = Again()
    paged.record(recorder)
    assert paged.graphs is not None
    rows = rows_of([3, 5], [7, 9])
    forward = paged.graphs.forward
    assert forward(rows, BLOCK, (64, 256)) is None  # the first of its size
    norm = paged.model.decoder.layers[0].pre_mlp_layernorm
    handle = norm.register_forward_pre_hook(lambda *_: None)
    assert forward(rows, BLOCK, (64, 256)) is None  # somebody looks at hidden states
    handle.remove()
    mixed = PassRows(
        np.arange(3), np.array([3, 0, 1]), np.array([3, 16, 17]), np.array([0, 1]), np.array([1, 2]),
        rows.blocks_RB, np.array([0, 2]),
    )  # fmt: skip
    assert forward(mixed, BLOCK, (64, 256)) is None  # a piece of a prompt is among them
    assert recorder.made == 0
    paged.forward(rows)  # makes the pool's tensors
    assert recorder.made == 1


def test_marked_rows_and_looks_at_the_ends_run_as_they_come(paged: PagedModel) -> None:
    recorder, rows = Again(), rows_of([3, 5, 1], [7, 9, 11])
    wanted = paged.forward(rows).clone()
    paged.record(recorder)
    live: Any = paged.live  # type: ignore[attr-defined]
    for _ in range(3):
        torch.testing.assert_close(paged.forward(rows), wanted, rtol=1e-4, atol=1e-4)
    assert paged.graphs is not None
    passes = paged.graphs.passes
    assert passes == 2
    live.observe()
    with live.real_tokens([True, False, True]):
        torch.testing.assert_close(paged.forward(rows), wanted, rtol=1e-4, atol=1e-4)
    assert live.observe().load_LE.sum(1).tolist() == [2 * tiny.TOP_K] * len(live.layers)
    for module in (paged.model.decoder.final_layernorm, paged.model.embedding.word_embeddings):
        seen: list[Any] = []
        handle = module.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        paged.forward(rows)
        handle.remove()
        assert seen == [1]
    assert paged.graphs.passes == passes
    paged.forward(rows)
    assert paged.graphs.passes == passes + 1


def test_a_model_that_is_not_attached_runs_as_it_comes() -> None:
    models = tiny.load(), tiny.load()
    attach(models[1], experts="loop")
    rows, found = rows_of([0, 0], [7, 9]), []
    for model in models:
        paged = PagedModel(model, KvPool(64, BLOCK, torch.float32, torch.device("cpu")), 64)
        paged.record(Again())
        found.append(paged.forward(rows).clone())
        for _ in range(2):
            torch.testing.assert_close(paged.forward(rows), found[-1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(*found)


def test_a_model_that_cannot_be_recorded_goes_on(paged: PagedModel, caplog: pytest.LogCaptureFixture) -> None:
    class Never:
        def record(self, call: Callable[[EndPiece], Any]) -> Any:
            raise RuntimeError("operation not permitted when stream is capturing")

    rows = rows_of([3, 5], [7, 9])
    wanted = paged.forward(rows)
    paged.record(Never())
    for _ in range(3):
        assert torch.equal(paged.forward(rows), wanted)
    assert "cannot be recorded" in caplog.text
    assert paged.graphs is not None
    assert not paged.graphs.usable


@pytest.mark.parametrize(("count", "size"), [(1, 1), (3, 4), (8, 8), (9, 16), (64, 64), (65, 96), (97, 128)])
def test_sizes(count: int, size: int) -> None:
    assert room._round(count) == size
