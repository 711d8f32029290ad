"""Experts that move beside the passes of two ranks on one GPU: outputs, overlap, memory, per-layer mode."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moeless_opt.problems.arrays import FloatArray, SlotArray
from moeless_opt.problems.spec import Links
from moeless_opt.runtime.control import Controller
from moeless_opt.runtime.engines.attach import attach
from moeless_opt.runtime.gpu_check.ranks import MOST, RANKS, apart, everywhere, replicated, smaller, together
from moeless_opt.runtime.gpu_check.setting import Setting, forward, model, synchronise, tokens
from moeless_opt.runtime.gpu_check.sheet import Sheet
from moeless_opt.runtime.gpu_check.timeline import time_beside, timeline
from moeless_opt.runtime.live import PinnedHome, static_slots
from moeless_opt.runtime.predict import GatePredictor, PerLayer, plain_gates

TITLE = "experts move beside forward passes: two ranks, staged through host memory"
LINES = (
    "outputs beside one rank's",
    "outputs while experts move",
    "plans carried out",
    "forward passes that waited for a transfer",
    "transfers from home copies: time without kernels beside them",
    "forward pass while experts move",
    "memory beyond what was allowed",
    "memory after the way back",
    "per-layer mode: outputs",
    "per-layer mode: plans that failed",
    "per-layer mode: replicas that came from home copies",
)
SECONDS = 110
#: So that a rank's own home copies come before the other rank.
HOME_FIRST = Links(intra_node=1e9, inter_node=1e9, host=1e12)


def check(setting: Setting, sheet: Sheet) -> None:
    """Start the ranks, and compare with one rank alone."""
    setting = smaller(setting)
    folder = sheet.path.parent / "ranks"
    found, codes, logs = together(lambda rank: _rank(setting, rank, folder), folder, SECONDS - 15)
    first = found[0]
    if first is None or codes != [0] * RANKS:
        raise RuntimeError(f"the ranks ended with {codes}: {logs}")
    most = MOST[setting.dtype]
    logits = torch.load(folder / "logits.pt").to(setting.device)
    alone = forward(model(setting), tokens(setting, setting.prefill))
    sheet.take(LINES[0], apart(logits, alone), "relative, median token", most=most)
    worst = max(r["worst"] for r in found if r is not None)
    sheet.take(LINES[1], worst, "relative, median token", most=most)
    sheet.take(LINES[2], first["done"] / first["plans"], "of 1", least=1.0, detail={"bytes": first["bytes"]})
    sheet.take(LINES[3], max(r["waits"] for r in found if r is not None), "passes", most=0)
    # What two ranks on one GPU exchange goes through the host: there are few kernels to be beside of.
    sheet.take(LINES[4], first["bare"], "of 1", detail=first["overlap"])
    ratio = first["ms"]["moving"] / first["ms"]["calm"]
    sheet.take(LINES[5], ratio, "of one without", wish=1.1, detail=first["ms"])
    sheet.take(LINES[6], max(0.0, first["beyond"]), "experts", most=0)
    sheet.take(LINES[7], abs(first["left_MB"]), "MB", most=4.0)  # an expert has 17
    worst = max(r["layered"] for r in found if r is not None)
    sheet.take(LINES[8], worst, "relative, median token", most=most)
    sheet.take(LINES[9], first["errors"], "plans", most=0, detail={"said": first["said"]})
    sheet.take(LINES[10], first["from_home"], "replicas", least=1, detail=first["elastic"])


def _rank(setting: Setting, rank: int, folder: Path) -> dict[str, Any]:
    of, batch = model(setting), tokens(setting, setting.prefill)
    home = PinnedHome(RANKS)
    live = attach(of, home=home, checksums=True, timeout=30, staged=True, links=HOME_FIRST, experts="auto")
    wanted = forward(of, batch)
    if rank == 0:
        torch.save(wanted.cpu(), folder / "logits.pt")
    found = _moving(setting, live, batch, wanted)
    found |= _layered(setting, live, batch, wanted)
    live.detach()
    return found


def _moving(setting: Setting, live: Any, batch: torch.Tensor, wanted: torch.Tensor) -> dict[str, Any]:
    """Plans under traffic."""
    of, one = live.model, live.banks[0].expert_bytes
    plans = 2 if setting.dry else 6
    calm: list[float] = []
    moving: list[float] = []
    done, worst, beyond = 0, 0.0, 0.0
    synchronise(setting)
    # A pool has places for some replicas more from the start; what is beyond them counts.
    held = live.meter.now
    before = 0 if setting.dry else torch.cuda.memory_allocated(setting.device)
    more = 1 if setting.dry else 2
    static_LGC = static_slots(setting.experts, RANKS, setting.layers)

    def run(into: list[float]) -> None:
        nonlocal worst
        began = time.perf_counter()
        out = forward(of, batch)
        synchronise(setting)
        into.append(time.perf_counter() - began)
        worst = max(worst, apart(out, wanted))

    for _ in range(3 if setting.dry else 10):
        run(calm)
    bytes_before = live.migrator.bytes_moved
    for plan in range(plans):
        live.meter.reset_peak()
        target = static_LGC if plan % 2 else replicated(setting, plan, more)
        number = live.apply(target, max_extra_bytes=setting.layers * more * one)
        for _ in range(60):
            run(moving)
            if everywhere(live.migration(number).status in ("done", "aborted")):
                break
        done += live.migration(number).status == "done"
        beyond = max(beyond, (live.meter.peak - held) / one - 2 * setting.layers * more)
    overlap, bare = _overlap(setting, live, batch, replicated(setting, 99, more))
    live.apply(static_LGC)
    live.settle()
    synchronise(setting)
    left = 0 if setting.dry else torch.cuda.memory_allocated(setting.device) - before
    ms = [1e3 * statistics.median(times) for times in (calm[1:], moving)]
    return {
        "plans": plans,
        "done": done,
        "worst": worst,
        "waits": live.migrator.courier.waits,
        "bytes": live.migrator.bytes_moved - bytes_before,
        "ms": {"calm": ms[0], "moving": ms[1]},
        "beyond": beyond,
        "left_MB": left / 1e6,
        "overlap": overlap,
        "bare": bare,
    }


def _overlap(
    setting: Setting, live: Any, batch: torch.Tensor, target_LGC: SlotArray
) -> tuple[dict[str, Any], float]:
    """Copies from pinned memory while a plan moves, and what of their time had no kernel beside it."""
    number = live.apply(target_LGC)

    def passes() -> None:
        for _ in range(8):
            forward(live.model, batch)

    spans = timeline(passes, setting.device)
    live.settle()
    if live.migration(number).status != "done":
        raise RuntimeError(f"a plan was not carried out: {live.migration(number).reason}")
    copies = [s for s in spans if s.kind == "gpu_memcpy" and "HtoD" in s.name and s.end - s.begin > 50]
    total, shared = time_beside(copies, [s for s in spans if s.kind == "kernel"])
    detail = {"copies": len(copies), "us": total, "us_beside_kernels": shared}
    return detail, 1 - shared / total if total else float(not setting.dry)


class _Hottest:
    """Plans the most loaded expert onto every rank."""

    def plan_layer(self, layer: int, load_E: FloatArray, slots_GC: SlotArray) -> SlotArray:
        hot, experts = int(np.argmax(load_E)), len(load_E)
        rows = [row.tolist() for row in static_slots(experts, len(slots_GC))]
        rows = [row if hot in row else [*row, hot] for row in rows]
        width = max(map(len, rows))
        return np.array([row + [-1] * (width - len(row)) for row in rows], np.int32)


def _layered(setting: Setting, live: Any, batch: torch.Tensor, wanted: torch.Tensor) -> dict[str, Any]:
    """The per-layer mode with elastic experts."""
    elastic = live.elastic(2, clock="passes", slots=setting.experts)
    controller = Controller(live, _Hottest())
    worst = 0.0
    other = tokens(setting, setting.prefill, 7)
    with PerLayer(live, controller, GatePredictor(plain_gates(live.model)), distance=1):
        for _ in range(3 if setting.dry else 6):
            forward(live.model, other)
            worst = max(worst, apart(forward(live.model, batch), wanted))
    controller.drain()
    live.settle()
    told = elastic.report()
    errors = [d.error for d in controller.layer_decisions if d.error]
    controller.close()
    return {
        "layered": worst,
        "errors": len(errors),
        "said": errors[:2],
        "from_home": told.from_home,
        "elastic": {"cold_starts": told.cold_starts, "reuses": told.reuses},
    }
