"""What the host and the device did during a call, from torch's profiler."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

__all__ = ["Span", "host_calls", "host_waits", "pageable", "spans_of", "time_beside", "timeline"]

#: Calls in which the host waits for the device, or which stop the device.
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
#: Calls that get memory from the driver, or give it back.
MEMORY = ("cudaMalloc", "cudaFree", "cudaHostAlloc", "cudaFreeHost", "cudaMallocHost")


#: Kinds of spans that are calls of CUDA by the host.
HOST = ("cuda_runtime", "cuda_driver")
#: Marks the call in a trace.
CALL = "moeless gpu_check"


class Span(NamedTuple):
    """Something that took time; microseconds."""

    kind: str
    name: str
    begin: float
    end: float
    stream: int


def timeline(call: Callable[[], Any], device: torch.device, keep: Path | None = None) -> list[Span]:
    """Run a call under the profiler until the device has done it; of the host only what the call did.

    The trace in Chrome's form is written to `keep`, compressed, if that is given.
    """
    from torch.profiler import ProfilerActivity, profile, record_function

    gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu
    with profile(activities=activities, acc_events=True) as seen:
        with record_function(CALL):
            call()
        if gpu:
            torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        seen.export_chrome_trace(str(path))
        text = path.read_text(encoding="utf-8")
    if keep is not None:
        keep.write_bytes(gzip.compress(text.encode()))
    return spans_of(json.loads(text))


def spans_of(trace: dict[str, Any]) -> list[Span]:
    """Spans of a trace in Chrome's form, as the profiler writes it.

    The profiler waits for the device, too: of the calls of CUDA those inside the mark of the call count.
    """
    out = []
    for event in trace["traceEvents"]:
        if event.get("ph") == "X" and "cat" in event:
            begin = float(event["ts"])
            stream = event.get("args", {}).get("stream", -1)
            out.append(
                Span(
                    str(event["cat"]),
                    str(event["name"]),
                    begin,
                    begin + float(event.get("dur", 0)),
                    int(stream) if isinstance(stream, int) else -1,
                )
            )
    marks = [s for s in out if s.kind == "user_annotation" and s.name == CALL]
    return [s for s in out if s.kind not in HOST or any(m.begin <= s.begin <= m.end for m in marks)]


def host_calls(spans: Iterable[Span], names: Sequence[str]) -> Counter[str]:
    """How often the host called each of these functions of CUDA (versions in names are left out)."""
    calls = (s.name.split("_v")[0] for s in spans if s.kind in HOST)
    return Counter(name for name in calls if name in names)


def host_waits(spans: Iterable[Span]) -> Counter[str]:
    """Calls in which the host waited."""
    return host_calls(spans, WAITS)


def pageable(spans: Iterable[Span]) -> int:
    """Copies from or to memory of the host that is not pinned."""
    return sum(s.kind == "gpu_memcpy" and "Pageable" in s.name for s in spans)


def time_beside(these: Iterable[Span], by: Iterable[Span]) -> tuple[float, float]:
    """Time of the first spans, and how much of it passed while any of the others ran; microseconds."""
    busy: list[list[float]] = []
    for begin, end in sorted((s.begin, s.end) for s in by):
        if busy and begin <= busy[-1][1]:
            busy[-1][1] = max(busy[-1][1], end)
        else:
            busy.append([begin, end])
    total = shared = 0.0
    for span in these:
        total += span.end - span.begin
        shared += sum(max(0.0, min(span.end, end) - max(span.begin, begin)) for begin, end in busy)
    return total, shared
