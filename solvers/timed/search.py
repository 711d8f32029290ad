"""Planning by the clock: placements and shares for any time model, also measured curves, from what is live.

A GPU's time depends on its tokens and on how many experts it activates, ``f(tokens, activated)``. Spreading
an expert over more GPUs levels the tokens and activates it more often, so a perfect balance of tokens is
slower than need be, and one replica per expert is uneven. This is scheduling of splittable jobs with a set-up
per machine and job [1]_, here with machines that hold few jobs, set-ups that depend on the curve, and a price
of moves.

*Search.* Every expert starts whole on a holder. Then the slowest GPU is relieved by the best single step: an
expert's tokens go, all or in part, to a GPU that serves it, holds it or loads it; or two experts change
places. When no step helps, the best so far is shaken and the search goes on (iterated local search). The same
search gives the shares on a fixed placement (nothing may be loaded) and the plan for the next pass, where
loading a replica costs its transfer beyond the time that hides it (`lead`), plus a price.

References
----------
.. [1] B. Chen, Y. Ye, J. Zhang, "Lot-sizing scheduling with batch setup times", J. Scheduling 9 (2006).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray, SlotArray
from moeless_opt.problems.plan import TimeTable
from moeless_opt.problems.spec import TimeModel, held_LGE
from moeless_opt.solvers.core import Stop
from moeless_opt.solvers.pack import fast

__all__ = ["Timed", "kicks_for", "timed_plan", "timed_shares", "warm_timed"]

UNWATCHED = 50_000  # rows x experts x GPUs x descents that are done sooner than a watcher is there
EVERY = 0.01  # seconds between questions to `stop`
KICKS = 16
"""Most shakes of a layer: enough for 8 to 16 experts to come within a percent of the optimum on average."""


@dataclass(frozen=True, slots=True)
class Timed:
    """What the search found.

    Parameters
    ----------
    slots_LGC : array of int32, shape [L, G, C]
        Placement.
    share_LGC : array, shape [L, G, C]
        Share of its expert's tokens that each slot serves.
    value_L : array, shape [L]
        Largest GPU time, plus waiting for weights and the price of moves.
    """

    slots_LGC: SlotArray
    share_LGC: FloatArray
    value_L: FloatArray


def kicks_for(experts: int) -> int:
    """Shakes that leave a layer well under a millisecond: fewer of more expensive ones."""
    return min(KICKS, max(2, 16 * KICKS // experts))


def _search(
    load_RE: FloatArray,
    held_REG: BoolArray,
    room_RG: IntArray,
    speed_G: FloatArray,
    table: TimeTable,
    *,
    loading: tuple[FloatArray, FloatArray | None, FloatArray | None] | None = None,
    kicks: int | None,
    start_LEG: FloatArray | None = None,
    stop: Stop | None = None,
) -> tuple[FloatArray, FloatArray]:
    """Tokens of every expert on every GPU, shape [R, E, G], and the value of each row.

    `loading`, where replicas may be loaded: seconds for one, by GPU; by row the time that hides it, and
    a price.
    """
    from moeless_opt.solvers.timed import _kernels as kernels  # imports Numba: only when it is needed

    rows, experts = load_RE.shape
    y_REG = np.zeros((rows, experts, len(speed_G)))
    value_R, none_R = np.zeros(rows), np.zeros(rows)
    kicks = kicks_for(experts) if kicks is None else kicks
    load_G, lead_R, price_R = (np.zeros(len(speed_G)), None, None) if loading is None else loading
    costs = kernels.Costs(
        speed_G=_plain(speed_G),
        load_G=_plain(load_G),
        may_load=loading is not None,
        knot_K=_plain(table.knot_K),
        table_AK=_plain(table.table_AK),
        halt=np.zeros(1, dtype=np.int64),
    )
    with _watched(stop if y_REG.size * (1 + kicks) > UNWATCHED else None, costs.halt):
        kernels.rows(
            costs,
            _plain(load_RE),
            _plain(held_REG, np.bool_),
            _plain(room_RG, np.int64),
            none_R if lead_R is None else _plain(lead_R),
            none_R if price_R is None else _plain(price_R),
            kicks,
            np.zeros((1, 0, 0)) if start_LEG is None else _plain(start_LEG),
            y_REG,
            value_R,
        )
    return y_REG, value_R


def _plain(array: Any, dtype: Any = np.float64) -> Any:
    """As the kernels take it: for arrays of another kind, read-only ones too, they would be compiled anew."""
    array = np.asarray(array, dtype)
    return array if array.flags.carray else np.array(array, order="C")


def warm_timed() -> bool:
    """Compile or load the kernels; returns whether they are compiled (whether Numba is there)."""
    one, slots = np.ones((1, 1)), np.zeros((1, 1, 1), dtype=np.int32)
    table = TimeTable.of(TimeModel(), 1)
    timed_plan(one, slots, one.astype(np.int64), one[0], table, load_G=one[0], kicks=0)
    return fast.available()


@contextmanager
def _watched(stop: Stop | None, halt: IntArray) -> Iterator[None]:
    """Ask `stop` from a thread while a kernel runs; the kernel looks at `halt` in every round."""
    if stop is None:
        yield
        return
    done, raised = threading.Event(), []

    def watch() -> None:
        try:
            while not done.wait(EVERY):
                if stop():
                    halt[0] = 1
                    return
        except BaseException as error:  # a caller's criterion may raise anything: it is theirs to see
            halt[0] = 1
            raised.append(error)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    if raised:
        raise raised[0]


def timed_shares(
    load_RE: FloatArray,
    slots_LGC: SlotArray,
    speed_G: FloatArray,
    table: TimeTable,
    *,
    kicks: int | None = None,
    start_LGC: FloatArray | None = None,
    stop: Stop | None = None,
) -> tuple[FloatArray, FloatArray]:
    """Shares on a placement that make the slowest GPU end soon.

    Parameters
    ----------
    load_RE : array, shape [R, E]
        Tokens; R is a multiple of L, layers in turn.
    slots_LGC : array of int32, shape [L, G, C]
        Placement.
    speed_G : array, shape [G]
        Relative speeds.
    table : TimeTable
        Times.
    kicks : int, optional
        Shakes of each row (`kicks_for` by default).
    start_LGC : array, shape [L, G, C], optional
        Shares to start from as well: those that the placement was planned with.
    stop : Stop, optional
        Asked all the while; every row is served in any case.

    Returns
    -------
    share_RGC : array, shape [R, G, C]
    time_R : array, shape [R]
        Largest GPU time of each row.
    """
    rows, experts = load_RE.shape
    held_LGE_ = held_LGE(slots_LGC, experts)
    room_LG = held_LGE_.sum(2).astype(np.int64)
    start_LEG = None
    if start_LGC is not None:
        start_LEG = np.zeros((*held_LGE_.shape[:2], experts + 1))
        np.put_along_axis(start_LEG, slots_LGC.astype(np.int64) + 1, start_LGC, axis=2)
        start_LEG = np.ascontiguousarray(start_LEG[:, :, 1:].transpose(0, 2, 1))
    y_REG, value_R = _search(
        load_RE,
        held_LGE_.transpose(0, 2, 1),
        room_LG,
        speed_G,
        table,
        kicks=kicks,
        start_LEG=start_LEG,
        stop=stop,
    )
    return _as_shares(load_RE, np.resize(slots_LGC, (rows, *slots_LGC.shape[1:])), y_REG), value_R


def _as_shares(load_RE: FloatArray, slots_RGC: SlotArray, y_REG: FloatArray) -> FloatArray:
    """Shares of the slots from tokens by GPU; an expert without tokens is served by its first slot."""
    rows, gpus, width = slots_RGC.shape
    place = np.maximum(slots_RGC, 0).astype(np.int64)
    r, g = np.arange(rows)[:, None, None], np.arange(gpus)[None, :, None]
    load_RGC = load_RE[r, place]
    filled = slots_RGC >= 0
    share_RGC = np.where(filled & (load_RGC > 0), y_REG[r, place, g] / np.maximum(load_RGC, 1e-300), 0.0)
    row, slot = np.nonzero((filled & (load_RGC <= 0)).reshape(rows, gpus * width))
    if row.size:
        _, first = np.unique(row * load_RE.shape[1] + place.reshape(rows, -1)[row, slot], return_index=True)
        share_RGC.reshape(rows, -1)[row[first], slot[first]] = 1.0
    return np.asarray(share_RGC)


def timed_plan(
    load_LE: FloatArray,
    live_LGC: SlotArray,
    capacity_LG: IntArray,
    speed_G: FloatArray,
    table: TimeTable,
    *,
    load_G: FloatArray,
    lead_L: FloatArray | None = None,
    price_L: FloatArray | None = None,
    kicks: int | None = None,
    stop: Stop | None = None,
) -> Timed:
    """Plan from what is live: which replicas to load, and which serve how many tokens.

    Replicas that are held and not used stay where there is room, those of heavy experts first: they cost no
    time and are ready if the loads turn out otherwise.

    Parameters
    ----------
    load_LE : array, shape [L, E]
        Tokens expected.
    live_LGC : array of int32, shape [L, G, C]
        What is held; every expert somewhere, nowhere more than fits.
    capacity_LG : array of int, shape [L, G]
        Slots.
    speed_G : array, shape [G]
        Relative speeds.
    table : TimeTable
        Times.
    load_G : array, shape [G]
        Seconds (the table's unit) until a GPU has loaded one replica.
    lead_L : array, shape [L], optional
        Time in which loading is hidden; none by default.
    price_L : array, shape [L], optional
        What a load must save at least, besides; nothing by default.
    kicks : int, optional
        Shakes of each layer (`kicks_for` by default).
    stop : Stop, optional
        Asked all the while; every layer is planned in any case.
    """
    from moeless_opt.solvers.timed import _kernels as kernels

    layers, experts = load_LE.shape
    held_LEG = np.ascontiguousarray(held_LGE(live_LGC, experts).transpose(0, 2, 1))
    room_LG = np.array(capacity_LG, dtype=np.int64, order="C")  # slots that homes take are taken off
    home_LE = np.empty((layers, experts), dtype=np.int64)
    kernels.reserve(_plain(load_LE), held_LEG, room_LG, home_LE)
    y_LEG, value_L = _search(
        load_LE,
        held_LEG,
        room_LG,
        speed_G,
        table,
        loading=(load_G, lead_L, price_L),
        kicks=kicks,
        stop=stop,
    )
    slots_LGC = _slots(load_LE, y_LEG, held_LEG, home_LE, np.asarray(capacity_LG))
    return Timed(slots_LGC, _as_shares(load_LE, slots_LGC, y_LEG), value_L)


def _slots(
    load_LE: FloatArray,
    y_LEG: FloatArray,
    held_LEG: BoolArray,
    home_LE: IntArray,
    capacity_LG: IntArray,
) -> SlotArray:
    """What serves, and what stays, as slots."""
    layers, _, gpus = y_LEG.shape
    width = int(capacity_LG.max())
    # Rank: homes and what serves first, then what is held, heavy experts first.
    heavy_LE = load_LE / np.maximum(load_LE.max(1, keepdims=True), 1e-300)
    rank_LEG = np.where(held_LEG, 1.0 + heavy_LE[:, :, None], 0.0)
    rank_LEG[y_LEG > 0] = 3.0
    layer, expert = np.nonzero(home_LE >= 0)
    rank_LEG[layer, expert, home_LE[layer, expert]] = 3.0
    rank_LGE = rank_LEG.transpose(0, 2, 1)
    top_LGC = np.argsort(-rank_LGE, axis=2, kind="stable")[:, :, :width]
    kept = np.take_along_axis(rank_LGE, top_LGC, axis=2) > 0
    kept &= np.arange(top_LGC.shape[2]) < capacity_LG[:, :, None]
    slots_LGC = np.full((layers, gpus, width), -1, dtype=np.int32)
    slots_LGC[:, :, : top_LGC.shape[2]] = np.where(kept, top_LGC, -1)
    return slots_LGC
