"""The closed loop: queues by hand, limits of a batch, and what fewer replicas buy."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless_opt.problems.errors import InfeasibleError, ProblemError
from moeless_opt.problems.io.arrivals import Arrivals, Lengths
from moeless_opt.problems.io.traces import TokenTraces, loads_by_step
from moeless_opt.problems.spec.placement import contiguous
from moeless_opt.runtime.simulate.backend import SimulatedBackend
from moeless_opt.runtime.simulate.cli import main
from moeless_opt.runtime.simulate.drive import drive
from moeless_opt.runtime.simulate.foresight import Assumed, Predictions, Recorded
from moeless_opt.runtime.simulate.policies import POLICIES
from moeless_opt.runtime.simulate.routes import DrawnRoutes, PlayedRoutes, recorded_lengths
from moeless_opt.runtime.simulate.serving import ClosedLoop
from moeless_opt.runtime.simulate.settings import Settings
from moeless_opt.runtime.simulate.traffic import RoutingModel
from tests.oracles.small_machine import CAPACITY, MODEL, machine_of

MACHINE = machine_of(1, 4, intra_node=1e9, inter_node=1e8, slower=10)
TOPOLOGY = MACHINE.topology
ROUTING = RoutingModel(
    popularity_DLE=np.random.default_rng(0).uniform(0.5, 1.5, (2, 3, 4)), concentration=8.0, top_k=2
)


def arrivals_of(times: list[float], prompts: list[int], outputs: list[int]) -> Arrivals:
    return Arrivals(time_R=np.array(times), prompt_R=np.array(prompts), output_R=np.array(outputs))


def backend_of(shares: str = "equal") -> SimulatedBackend:
    return SimulatedBackend(MACHINE, contiguous(4, CAPACITY), CAPACITY, shares=shares)


def run(
    arrivals: Arrivals, **options: object
) -> tuple[ClosedLoop, SimulatedBackend, list[float], list[float]]:
    """Serve; the starts and the ends of all passes besides."""
    backend = backend_of()
    loop = ClosedLoop(backend, ROUTING, arrivals, **options)  # type: ignore[arg-type]
    starts, ends = [], []
    for passes in loop:
        starts.append(float(passes.start_B[0]))
        backend.run(passes)
        ends.append(backend.now)
    return loop, backend, starts, ends


def test_one_request_by_hand() -> None:
    loop, _, starts, ends = run(arrivals_of([2.0], [50], [4]))
    served = loop.served()
    assert starts == [2.0, *ends[:-1]]
    assert len(ends) == 4
    assert served.first_R[0] == pytest.approx(ends[0] - 2.0)
    assert served.whole_R[0] == pytest.approx(ends[3] - 2.0)
    assert served.each_R[0] == pytest.approx((ends[3] - ends[0]) / 3)
    assert served.queued_R[0] == 0
    assert (served.passes, served.largest, served.batch) == (4, 1, 1.0)


def test_the_second_one_waits_for_the_pass_that_runs() -> None:
    _, _, _, ends = run(arrivals_of([0.0], [400], [3]))
    late = ends[0] / 2  # while the first one's prompt is read
    loop, _, starts, both = run(arrivals_of([0.0, late], [400, 10], [3, 1]))
    served = loop.served()
    assert served.queued_R[1] == pytest.approx(both[0] - late)
    assert served.first_R[1] == pytest.approx(both[1] - late)
    assert starts[1] == pytest.approx(both[0])
    assert np.isnan(served.each_R[1])  # one token has no further ones
    assert served.whole_R[1] == served.first_R[1]
    assert served.largest == 2


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 4), st.integers(20, 200))
def test_everybody_is_served_within_the_limits(seed: int, count: int, most: int, tokens: int) -> None:
    rng = np.random.default_rng(seed)
    arrivals = arrivals_of(
        np.sort(rng.uniform(0, 0.05, count)).tolist(),
        rng.integers(0, 100, count).tolist(),
        rng.integers(1, 6, count).tolist(),
    )
    backend = backend_of()
    loop = ClosedLoop(backend, ROUTING, arrivals, most_requests=most, most_tokens=tokens, seed=seed)
    before = 0.0
    written = 0.0
    for passes in loop:
        assert passes.start_B[0] >= before
        alone = int(np.maximum(arrivals.prompt_R, 1).max())
        assert passes.tokens_B[0] <= max(tokens, alone + most)
        assert (passes.load_BLE.sum(2) == passes.tokens_B[0] * 2).all()
        backend.run(passes)
        before = backend.now
        written += passes.tokens_B[0]
    served = loop.served()
    assert np.isfinite(served.whole_R).all()
    assert served.largest <= most
    assert written == np.maximum(arrivals.prompt_R, 1).sum() + (arrivals.output_R - 1).sum()
    assert (np.diff(loop._start_R) >= 0).all(), "first come, first served"


def test_the_cache_limits_the_batch_and_fewer_replicas_make_it_larger() -> None:
    arrivals = arrivals_of([0.0] * 12, [100] * 12, [20] * 12)
    weights = MACHINE.other_bytes / 4 + 2 * 3 * MODEL.expert_bytes  # two replicas a GPU and layer
    each = 120 * MACHINE.kv_bytes * 3
    memory = weights + 3 * each / 4  # room for three whole requests, over four GPUs
    few = backend_of()
    full = SimulatedBackend(
        MACHINE,
        np.array([[[g, (g + 1) % 4] for g in range(4)]] * 3, dtype=np.int32),
        CAPACITY,
        shares="equal",
    )
    largest = {}
    for name, backend in (("few", few), ("full", full)):
        loop = ClosedLoop(backend, ROUTING, arrivals, memory=memory)
        drive(backend, loop)
        served = loop.served()
        assert np.isfinite(served.whole_R).all()
        assert served.held_back > 0
        largest[name] = served.largest
    extra = 4 * 3 * MODEL.expert_bytes / each  # requests in place of a replica a GPU and layer
    assert largest["full"] == 3
    assert largest["few"] == 3 + int(extra)


def test_what_never_fits_is_said() -> None:
    arrivals = arrivals_of([0.0], [1000], [20])
    with pytest.raises(InfeasibleError, match="do not hold the weights"):
        next(iter(ClosedLoop(backend_of(), ROUTING, arrivals, memory=1.0)))
    weights = MACHINE.other_bytes / 4 + 3 * MODEL.expert_bytes
    with pytest.raises(InfeasibleError, match="needs room for 1020 tokens"):
        next(iter(ClosedLoop(backend_of(), ROUTING, arrivals, memory=weights + 10.0)))
    other = RoutingModel(popularity_DLE=np.ones((1, 2, 4)), concentration=1.0, top_k=2)
    with pytest.raises(ProblemError, match="layers, experts"):
        ClosedLoop(backend_of(), other, arrivals)


def test_routing_belongs_to_the_request() -> None:
    arrivals = arrivals_of([0.0, 0.0, 5.0], [40, 60, 80], [2, 3, 2])
    shares = []
    for most in (1, 8):  # different batches
        loop = ClosedLoop(backend_of(), ROUTING, arrivals, most_requests=most, seed=3)
        assert isinstance(loop.routes, DrawnRoutes)
        shares.append(loop.routes.of(np.arange(3)))
    assert np.array_equal(*shares)


def test_every_policy_serves_the_same_requests() -> None:
    rng = np.random.default_rng(1)
    arrivals = arrivals_of(
        np.sort(rng.uniform(0, 0.5, 20)).tolist(),
        rng.integers(10, 200, 20).tolist(),
        rng.integers(1, 10, 20).tolist(),
    )
    for name in ("static", "eplb", "oracle", "moeless", "ours-windowed", "stay"):
        policy = POLICIES[name]
        made = policy.build(MACHINE, TOPOLOGY, Settings(every=4))
        loop = ClosedLoop(made.backend, ROUTING, arrivals, memory=1e9)
        drive(made.backend, loop, made.controller, foresight=Assumed(0.1) if policy.per_pass else None)
        figures = loop.served().figures()
        assert figures["ended"] == 20, name
        assert 0 <= figures["queued_mean_s"] < figures["first_mean_s"] <= figures["whole_mean_s"]
        assert figures["whole_p99_s"] >= figures["whole_mean_s"]


def traces_of(tokens: list[int], prompts: list[int] | None = None) -> TokenTraces:
    rng = np.random.default_rng(5)
    chosen = rng.permuted(np.tile(np.arange(4), (sum(tokens), 3, 1)), axis=2)[:, :, :2]
    return TokenTraces(
        experts_TLK=chosen,
        offsets=np.concatenate([[0], np.cumsum(tokens)]),
        experts=4,
        prompt_tokens=np.array(prompts or [0] * len(tokens)),
    )


def test_recorded_requests_are_written_token_by_token() -> None:
    traces = traces_of([6, 4], [2, 1])
    drawn_R = np.array([1, 0])
    arrivals, first, _ = recorded_lengths(traces, arrivals_of([0.0, 0.0], [9, 9], [9, 9]), drawn_R, None)
    assert (arrivals.prompt_R.tolist(), arrivals.output_R.tolist()) == ([1, 2], [4, 5])
    backend = backend_of()
    loop = ClosedLoop(backend, PlayedRoutes(traces, drawn_R, first, 0), arrivals)
    loads = []
    for passes in loop:
        loads.append(passes.load_BLE[0])
        backend.run(passes)
    rows = [[6, 0, 1], [7, 2], [8, 3], [9, 4], [5]]  # prompts of both, then a token of each
    assert len(loads) == len(rows)
    for load_LE, chosen in zip(loads, rows, strict=True):
        steps = np.zeros(len(chosen), dtype=np.int64)
        assert np.array_equal(load_LE, loads_by_step(traces, np.array(chosen), steps, 1)[0])


def test_prompts_that_are_not_recorded_go_where_their_request_went() -> None:
    traces = traces_of([3, 5])
    traces = traces.replace(experts_TLK=np.where(np.arange(8)[:, None, None] < 3, [0, 1], [2, 3])
                            + np.zeros((8, 3, 1), dtype=np.int64))  # fmt: skip
    lengths = Lengths(prompt_R=np.array([40, 7]), output_R=np.array([4, 9]))
    drawn_R = np.array([0])
    arrivals, first, text = recorded_lengths(traces, arrivals_of([0.0], [1], [1]), drawn_R, lengths)
    assert (arrivals.prompt_R.tolist(), arrivals.output_R.tolist()) == ([40], [4])
    assert "1 of the recorded answers are cut" in text  # nine of the second, of which six are known
    passes = next(iter(ClosedLoop(backend_of(), PlayedRoutes(traces, drawn_R, first, 0), arrivals)))
    assert passes.load_BLE[0].tolist() == [[40, 40, 0, 0]] * 3
    with pytest.raises(ProblemError, match="lengths: are of 1 requests, must be of the 2"):
        recorded_lengths(traces, arrivals, drawn_R, Lengths(prompt_R=np.array([1]), output_R=np.array([1])))
    halves, _, _ = recorded_lengths(traces, arrivals, np.array([1]), None)
    assert (halves.prompt_R.tolist(), halves.output_R.tolist()) == ([2], [4])


def test_recorded_gates_foresee_the_very_tokens_of_the_closed_loop() -> None:
    traces = traces_of([6, 4, 5], [2, 1, 3])
    said = np.repeat(traces.experts_TLK[:, :, None], 2, axis=2)  # what was said is what was chosen
    predictions = Predictions(traces=traces, said={"chosen_tuned": said})
    drawn_R = np.array([2, 0, 1])
    arrivals = arrivals_of([0.0, 0.0, 0.001], [1, 1, 1], [1, 1, 1])
    arrivals, first, _ = recorded_lengths(traces, arrivals, drawn_R, None)
    backend, routes = backend_of(), PlayedRoutes(traces, drawn_R, first, 0)
    foreseen = Recorded(predictions, routes.items(), "tuned", 1)
    for passes in ClosedLoop(backend, routes, arrivals, most_requests=2):
        assert np.array_equal(foreseen(passes)[:, 1:], passes.load_BLE[:, 1:])
        backend.run(passes)


def test_it_ends_in_time() -> None:
    arrivals = arrivals_of([0.0, 0.001, 3.0], [40, 60, 80], [200, 300, 2])
    loop, backend, starts, _ = run(arrivals, until=0.02)
    assert starts[-1] <= 0.02 < backend.now
    assert np.isnan(loop.served().whole_R).all()


def test_the_command_prints_and_returns_latencies(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--model Phi-3.5-MoE --policies static,stay --batching closed --rate 8 --seconds 1 --json"
    assert main([*arguments.split(), "--quiet", "--most-requests", "4"]) == 0
    printed = capsys.readouterr()
    rows = json.loads(printed.out)
    assert [row["requests"]["ended"] for row in rows] == [rows[0]["requests"]["ended"]] * 2
    assert all(row["requests"]["largest_batch"] <= 4 for row in rows)
    assert "first token s" in printed.err
    assert "a pass starts when the last one ends" in printed.err
    assert main([*arguments.split(), "--memory", "1"]) == 1
