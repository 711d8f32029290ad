"""The last minutes, second by second, for the live page."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from moeless_opt.runtime.serve import ServeStatus
from moeless_opt.runtime.serve.http.metrics import FrontMetrics

__all__ = ["History", "status_document"]

KEPT = 900
"""Seconds that are remembered."""

WINDOW = 10.0
"""Seconds over which percentiles are taken."""


class History:
    """Samples of a server's figures.

    Parameters
    ----------
    metrics : FrontMetrics
        Of the HTTP side.
    """

    def __init__(self, metrics: FrontMetrics) -> None:
        self._metrics = metrics
        self._samples: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self._before: tuple[float, int] | None = None

    def add(self, status: ServeStatus) -> None:
        """Remember how things are now."""
        now = time.monotonic()
        rate = 0.0
        if self._before is not None and now > self._before[0]:
            rate = (status.generated_tokens - self._before[1]) / (now - self._before[0])
        self._before = now, status.generated_tokens
        rows_L = status.tokens_LG.sum(axis=1)
        busy = rows_L > 0
        self._samples.append(
            {
                "at": round(time.time(), 3),
                "running": status.running,
                "waiting": status.waiting,
                "kv": status.kv_blocks_used / max(status.kv_blocks, 1),
                "tokens_per_second": round(rate, 2),
                "imbalance": float(status.imbalance_L[busy].mean()) if busy.any() else None,
                "replicas": int(status.replicas_LE.sum()),
                "cost": {rule: round(sum(parts), 6) for rule, parts in status.cost.items()},
                **self._metrics.latency(WINDOW),
            }
        )

    def since(self, at: float) -> list[dict[str, Any]]:
        """Samples after a time, oldest first."""
        return [sample for sample in self._samples if sample["at"] > at]


def status_document(status: ServeStatus, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """An engine's status and the samples of `History`, as JSON."""
    requests = ("running", "waiting", "capacity", "retried")
    tokens = ("passes", "prompt_tokens", "cached_tokens", "generated_tokens")
    experts = ("plans", "bytes_moved", "plan_seconds", "wait_seconds", "cold_starts", "prediction_error")
    return {
        "ready": status.ready,
        "ranks": status.ranks,
        "recoveries": status.recoveries,
        "restarts": status.restarts,
        "requests": {name: getattr(status, name) for name in requests} | {"finished": dict(status.finished)},
        "kv_blocks": {
            "all": status.kv_blocks,
            "used": status.kv_blocks_used,
            "cached": status.kv_cached_blocks,
        },
        "counters": {name: getattr(status, name) for name in (*tokens, *experts)},
        "layers": list(status.layers),
        "load": status.load_LE.tolist(),
        "rows": status.tokens_LG.tolist(),
        "replicas": status.replicas_LE.tolist(),
        "imbalance": [round(float(x), 4) for x in status.imbalance_L],
        "cost": {rule: {"experts": parts[0], "rest": parts[1]} for rule, parts in status.cost.items()},
        "events": [event_document(event) for event in status.events],
        "history": list(samples),
    }


def event_document(event: Any) -> dict[str, Any]:
    """A `PlanEvent` as JSON."""
    return {name: getattr(event, name) for name in event.__dataclass_fields__}
