"""Figures for Prometheus: what the HTTP side sees of requests, and what the engine says of itself.

Counters of the engine are read when somebody asks (a custom collector): serving pays nothing for them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from moeless_opt.runtime.serve import ServeEngine, ServeStatus

__all__ = ["FrontMetrics"]

FIRST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
NEXT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
WHOLE = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
RECENT = 20000


class FrontMetrics:
    """What was asked, how it ended, and how long it took.

    Parameters
    ----------
    engine : ServeEngine
        Asked for its status with every scrape, once it is ready.
    """

    def __init__(self, engine: ServeEngine) -> None:
        self.registry = CollectorRegistry()
        self.http = Counter(
            "moeless_http_requests", "HTTP requests", ["path", "method", "status"], registry=self.registry
        )
        self._ended = Counter(
            "moeless_requests", "Answers by how they ended", ["finish"], registry=self.registry
        )
        self._first = Histogram(
            "moeless_time_to_first_token_seconds",
            "Until the first token",
            buckets=FIRST,
            registry=self.registry,
        )
        self._next = Histogram(
            "moeless_time_per_output_token_seconds",
            "From token to token",
            buckets=NEXT,
            registry=self.registry,
        )
        self._whole = Histogram(
            "moeless_request_seconds", "Of a whole answer", buckets=WHOLE, registry=self.registry
        )
        for finish in ("stop", "length", "cancelled", "error"):
            self._ended.labels(finish)
        #: The newest times to the first token and from token to token: (when, seconds).
        self.firsts: deque[tuple[float, float]] = deque(maxlen=RECENT)
        self.nexts: deque[tuple[float, float]] = deque(maxlen=RECENT)
        self.registry.register(_EngineFigures(engine))

    def first_token(self, seconds: float) -> None:
        """An answer has begun."""
        self._first.observe(seconds)
        self.firsts.append((time.monotonic(), seconds))

    def next_token(self, seconds: float) -> None:
        """An answer has gone on."""
        self._next.observe(seconds)
        self.nexts.append((time.monotonic(), seconds))

    def ended(self, finish: str, seconds: float | None = None) -> None:
        """An answer has ended."""
        self._ended.labels(finish).inc()
        if seconds is not None:
            self._whole.observe(seconds)

    def latency(self, window: float) -> dict[str, float | None]:
        """Median and 99th percentile of both times over the last seconds."""
        found: dict[str, float | None] = {}
        since = time.monotonic() - window
        for name, samples in (("ttft", self.firsts), ("tpot", self.nexts)):
            recent = []
            for at, seconds in reversed(samples):
                if at < since:
                    break
                recent.append(seconds)
            for q in (50, 99):
                found[f"{name}_p{q}"] = float(np.percentile(recent, q)) if recent else None
        return found

    def scrape(self) -> bytes:
        """All figures in Prometheus' text form."""
        return generate_latest(self.registry)


def _number(kind: type[Metric], name: str, told: str, value: float) -> Metric:
    return kind(f"moeless_{name}", told, value=value)  # type: ignore[call-arg]


#: Kind, name, what is told of it, and where the engine's status has it.
_FIGURES: tuple[tuple[type[Metric], str, str, Callable[[ServeStatus], float]], ...] = (
    (GaugeMetricFamily, "ready", "Whether requests are served", lambda s: s.ready),
    (GaugeMetricFamily, "ranks", "Ranks that serve", lambda s: s.ranks),
    (GaugeMetricFamily, "requests_running", "Requests in the batch", lambda s: s.running),
    (GaugeMetricFamily, "requests_waiting", "Requests in the queue", lambda s: s.waiting),
    (GaugeMetricFamily, "queue_capacity", "How many requests may wait", lambda s: s.capacity),
    (GaugeMetricFamily, "kv_blocks", "Blocks of the KV pools", lambda s: s.kv_blocks),
    (GaugeMetricFamily, "kv_blocks_used", "Blocks that requests hold", lambda s: s.kv_blocks_used),
    (
        GaugeMetricFamily,
        "kv_blocks_cached",
        "Kept for prompts that begin alike",
        lambda s: s.kv_cached_blocks,
    ),
    (CounterMetricFamily, "passes", "Forward passes", lambda s: s.passes),
    (CounterMetricFamily, "prompt_tokens", "Tokens of prompts that were computed", lambda s: s.prompt_tokens),
    (
        CounterMetricFamily,
        "cached_prompt_tokens",
        "Those that needed no computing",
        lambda s: s.cached_tokens,
    ),
    (CounterMetricFamily, "generated_tokens", "Tokens generated", lambda s: s.generated_tokens),
    (CounterMetricFamily, "requests_retried", "Begun anew on another rank", lambda s: s.retried),
    (CounterMetricFamily, "recoveries", "Losses of ranks that were survived", lambda s: s.recoveries),
    (CounterMetricFamily, "restarts", "Processes of ranks started anew", lambda s: s.restarts),
    (CounterMetricFamily, "largest_rows", "Of layers' fullest ranks, pass by pass", lambda s: s.largest_rows),
    (CounterMetricFamily, "mean_rows", "Of a rank on average, likewise", lambda s: s.mean_rows),
    (CounterMetricFamily, "plans", "Plans applied", lambda s: s.plans),
    (CounterMetricFamily, "moved_bytes", "Weights moved by plans", lambda s: s.bytes_moved),
    (CounterMetricFamily, "plan_seconds", "Time of planning", lambda s: s.plan_seconds),
    (CounterMetricFamily, "weight_wait_seconds", "Waits of passes for weights", lambda s: s.wait_seconds),
    (CounterMetricFamily, "cold_starts", "Replicas fetched when they were wanted", lambda s: s.cold_starts),
)


class _EngineFigures:
    """What the engine says, in Prometheus' terms."""

    def __init__(self, engine: ServeEngine) -> None:
        self._engine = engine

    def describe(self) -> list[Metric]:
        """Nothing: registering must not ask an engine that is not ready."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The figures of now."""
        try:
            status = self._engine.status()
        except Exception:  # an engine that has failed must not take the other figures with it
            yield _number(GaugeMetricFamily, "ready", "Whether requests are served", 0)
            return
        for kind, name, told, value in _FIGURES:
            yield _number(kind, name, told, value(status))
        if status.prediction_error is not None:
            told = "Distance between foreseen and true loads (total variation)"
            yield _number(GaugeMetricFamily, "prediction_error", told, status.prediction_error)
        yield from self._by_label(status)

    @staticmethod
    def _by_label(s: ServeStatus) -> Iterator[Metric]:
        cost = CounterMetricFamily(
            "moeless_cost_gigabyte_seconds", "Memory times time, by charging rule", labels=["rule", "part"]
        )
        for rule, (experts, rest) in s.cost.items():
            cost.add_metric([rule, "experts"], experts)
            cost.add_metric([rule, "rest"], rest)
        yield cost
        imbalance = GaugeMetricFamily(
            "moeless_layer_imbalance", "Largest over mean rows of a rank, last window", labels=["layer"]
        )
        replicas = GaugeMetricFamily("moeless_layer_replicas", "Replicas in force", labels=["layer"])
        rows = GaugeMetricFamily("moeless_layer_rows", "Rows of a rank, last window", labels=["layer", "gpu"])
        for x, layer in enumerate(s.layers):
            imbalance.add_metric([str(layer)], float(s.imbalance_L[x]))
            replicas.add_metric([str(layer)], float(s.replicas_LE[x].sum()))
            for gpu, count in enumerate(s.tokens_LG[x]):
                rows.add_metric([str(layer), str(gpu)], float(count))
        yield imbalance
        yield replicas
        yield rows
