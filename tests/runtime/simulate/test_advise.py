"""``moeless-advise``: what it compares, by hand where that is possible, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeless_opt.api import plan
from moeless_opt.problems.errors import InfeasibleError, ProblemError
from moeless_opt.problems.spec.architecture import ModelSpec
from moeless_opt.problems.spec.topology import Topology
from moeless_opt.runtime.simulate import Policy, Scenario
from moeless_opt.runtime.simulate.advise import Offered, _from, _from_on, _Group, _looked_at, advise, widths
from moeless_opt.runtime.simulate.advise_cli import flags, main, traffic_of
from moeless_opt.runtime.simulate.hardware import slots_of
from moeless_opt.runtime.simulate.machine import Machine
from moeless_opt.runtime.simulate.shares import TimedRule
from moeless_opt.runtime.simulate.traffic import Passes

MODEL = ModelSpec(name="small", layers=3, experts=16, top_k=2, hidden=2048, ffn=4096)
MACHINE = Machine.of(Topology.uniform(1, 4, slots=1, name="4xA6000"), MODEL, gpu="A6000")


def traffic(share: object, **changes: Any) -> Offered:
    share_TLE = np.broadcast_to(np.asarray(share, dtype=float), (2, 3, 16))
    given = {
        "prompt": 500.0,
        "answer": 50.0,
        "reserved": 550.0,
        "held": 525.0,
        "rate": None,
        "most_requests": 64,
    }
    given |= {"concentration": 400.0, "source": "here", **changes}
    return Offered(share_TLE=share_TLE / share_TLE.sum(2, keepdims=True), **given)  # type: ignore[arg-type]


EVEN = np.ones(16)
SKEWED = np.r_[8.0, 6.0, np.ones(14)]


def test_even_loads_need_no_balancing() -> None:
    found = advise(MACHINE, traffic(EVEN), memory=20)
    assert found.best.split == "static"
    assert found.best.redundant == 0
    assert "--enable-eplb" not in flags(found)["vllm"]
    assert flags(found)["vllm"] == f"--data-parallel-size {found.best.width} --enable-expert-parallel"


def test_skewed_loads_are_balanced_where_there_is_memory() -> None:
    rich = advise(MACHINE, traffic(SKEWED, answer=4.0), memory=40)
    assert rich.best.split != "static"
    assert rich.best.redundant == rich.best.slots * rich.best.width - 16
    assert rich.best.capacity > 1.01 * rich.static.capacity
    assert rich.best.imbalance < 1.2
    assert rich.writing is not None or rich.reading is not None
    told = flags(rich)
    engine = rich.engine  # shares evenly
    assert engine.split == "equal"
    assert engine.capacity < rich.best.capacity
    assert f'"num_redundant_experts": {engine.redundant}' in told["vllm"]
    assert f"--ep-num-redundant-experts {engine.redundant}" in told["sglang"]
    assert f"num_slots: {engine.slots * engine.width}" in told["tensorrt-llm"]
    # No more is held than is within a percent as good.
    for choice in rich.choices:
        assert choice.capacity <= 1.011 * rich.best.capacity
    fewer = [c for c in rich.choices if c.expert_bytes < rich.best.expert_bytes]
    assert all(c.capacity < rich.best.capacity / 1.0099 for c in fewer)


def test_memory_decides_the_width() -> None:
    """One GPU just holds the model: nothing is left for requests, so the experts are spread."""
    whole = MACHINE.layer_bytes * 3 + 16 * 3 * MODEL.expert_bytes
    tight = advise(MACHINE, traffic(EVEN, most_requests=10_000), memory=(whole + 2e7) / 1e9)
    assert tight.best.width == 4
    assert {c.width for c in tight.choices} == {1, 2, 4}
    by_width = {c.width: c for c in tight.choices if not c.redundant}
    assert by_width[1].cache_tokens == pytest.approx(2e7 / MACHINE.kv_token_bytes, rel=1e-3)
    assert by_width[1].requests < by_width[2].requests < by_width[4].requests
    for little in ({"memory": 0.1}, {"memory": 20, "most_slots": 0}):
        with pytest.raises(InfeasibleError, match="fits on no group of up to 4 A6000s"):
            advise(MACHINE, traffic(EVEN), **little)  # type: ignore[arg-type]


def test_a_rate_asks_for_the_quickest_that_keeps_up() -> None:
    most = advise(MACHINE, traffic(EVEN), memory=20, most_slots=5)
    slow = advise(MACHINE, traffic(EVEN, rate=0.1 * most.served), memory=20, most_slots=5)
    assert slow.best.batch < most.best.batch
    assert slow.best.token_s < most.best.token_s
    assert slow.served >= slow.rate  # type: ignore[operator]
    over = advise(MACHINE, traffic(EVEN, rate=3 * most.served), memory=20, most_slots=5)
    assert over.best.capacity == pytest.approx(most.best.capacity)
    assert any("3.0 times as many GPUs" in reason for reason in over.reasons)


def test_the_same_advice_every_time_and_for_one_gpu() -> None:
    a, b = (advise(MACHINE, traffic(SKEWED), memory=20, most_slots=5) for _ in range(2))
    assert a.best == b.best
    alone = Machine.of(Topology.uniform(1, 1, slots=1), MODEL, gpu="A6000")
    found = advise(alone, traffic(SKEWED), memory=20)
    assert (found.best.width, found.best.split, found.writing, found.reading) == (1, "static", None, None)


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = {
        "hidden_size": 1024,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 2,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 1000,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    np.savez(tmp_path / "loads.npz", counts=np.random.default_rng(0).integers(1, 99, (3, 2, 8)))
    base = ["--model", str(tmp_path), "--topology", "4xH200", "--prompt", "100", "--answer", "20"]
    assert main([*base, "--loads", str(tmp_path / "loads.npz"), "--rate", "5"]) == 0
    text = capsys.readouterr().out
    for part in (
        "advised",
        "3 scenarios",
        "requests in flight",
        "vllm:\n  --data-parallel-size",
        "5 requests/s",
    ):
        assert part in text
    assert main([*base, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["format"] == "moeless-advice"
    assert found["best"]["gpu_hours"] > 0
    assert set(found["flags"]) == {"vllm", "sglang", "tensorrt-llm"}


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ("--model Mixtrl", 2, "'Mixtrl' is unknown"),
        ("--model Mixtral-8x7B --gpu H20", 2, "'H20' is unknown; did you mean 'H200'?"),
        ("--model Mixtral-8x7B --prompt 0", 2, "--prompt: is 0"),
        ("--model Mixtral-8x7B --rate 0", 2, "--rate: is 0"),
        ("--model Mixtral-8x7B --most-requests 0", 2, "--most-requests: is 0"),
        ("--model Mixtral-8x7B --timed 3", 2, "--timed: is '3'"),
        ("--model Mixtral-8x7B --loads none.npz", 2, "none.npz"),
        ("--model DeepSeek-V3 --topology 8xA6000", 1, "fits on no group of up to 8 A6000s"),
        ("--topology 8xA6000", 2, "--model"),
        ("--model Mixtral-8x7B --slots 3", 2, "--slots 3"),
        ("--model Mixtral-8x7B --seed -1", 2, "--seed: is -1"),
        ("--model Mixtral-8x7B --seed 3 --loads none.npz", 2, "--seed: is 3, but it is for generated loads"),
        ("--model Mixtral-8x7B --topology 8xH100 --memory 81", 2, "--memory: is 81, but an H100 has 80 GB"),
        ("--model Mixtral-8x7B --topology 8xH100 --memory 11", 1, "experts takes 11.3 GB"),
    ],
)
def test_what_cannot_be_is_one_line(
    arguments: str, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments.split()) == code
    printed = capsys.readouterr().err
    assert printed.startswith("moeless-advise: ")
    assert said in printed
    assert printed.count("\n") == 1


def test_a_few_layers_first_then_all() -> None:
    """Half of the layers are skewed: a look at the first or the last ones alone would be wrong by far."""
    model = MODEL.replace(layers=12)
    hot = np.r_[40.0, np.ones(15)]
    share_TLE = np.repeat(np.stack([EVEN] * 6 + [hot] * 6)[None], 2, axis=0)
    share_TLE /= share_TLE.sum(2, keepdims=True)
    assert _looked_at(share_TLE, 4).tolist() == [1, 4, 7, 10]
    assert _looked_at(share_TLE[:, ::-1], 4).tolist() == [1, 4, 7, 10]
    assert _looked_at(share_TLE, 12).tolist() == list(range(12))
    offered = dataclasses.replace(traffic(EVEN, answer=4.0), share_TLE=share_TLE)
    found = advise(MACHINE.replace(model=model), offered, memory=40, most_slots=8)
    assert {found.best.layers, found.static.layers, found.engine.layers} == {12}
    assert {choice.layers for choice in found.settings} == {8, 12}


def test_flags_of_groups_over_nodes() -> None:
    found = advise(MACHINE, traffic(SKEWED, answer=4.0), memory=40, most_slots=5)
    wide = dataclasses.replace(found.engine, width=16, nodes=2, split="equal", slots=2, redundant=16)
    told = flags(dataclasses.replace(found, engine=wide))
    assert told["vllm"].startswith(
        "--data-parallel-size 16 --data-parallel-size-local 8 --enable-expert-para"
    )
    assert "--tp-size 16 --dp-size 16 --enable-dp-attention --ep-size 16 --nnodes 2" in told["sglang"]
    assert "num_slots: 32" in told["tensorrt-llm"]
    many = dataclasses.replace(wide, redundant=1024)
    told = flags(dataclasses.replace(found, engine=many))
    assert told["vllm"] == "# takes at most 1,023 redundant experts, not 1,024"
    alone = dataclasses.replace(found.engine, width=1, nodes=1, split="static", redundant=0)
    told = flags(dataclasses.replace(found, engine=alone))
    assert (told["vllm"], told["sglang"]) == ("--data-parallel-size 1", "--tp-size 1")


def test_lengths_and_rate_of_a_trace(tmp_path: Path) -> None:
    """Long answers are in flight for long: what a request keeps is weighted by that."""
    head = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    rows = ["2023-11-16 18:15:00,100,10\n", "2023-11-16 18:15:10,300,30\n", "2023-11-16 18:15:20,200,0\n"]
    (tmp_path / "trace.csv").write_text(head + "".join(rows))
    found = traffic_of(MODEL, arrivals=str(tmp_path / "trace.csv"))
    assert found.rate == pytest.approx(2 / 20)
    assert (found.prompt, found.answer) == (200, pytest.approx(41 / 3))
    assert found.reserved == pytest.approx((110 * 10 + 330 * 30 + 201) / 41)
    assert found.held == pytest.approx((105 * 10 + 315 * 30 + 200.5) / 41)
    (tmp_path / "trace.csv").write_text(head + rows[0])
    with pytest.raises(ProblemError, match="no two requests at different times"):
        traffic_of(MODEL, arrivals=str(tmp_path / "trace.csv"))


def test_long_recordings_are_summed_in_their_order(tmp_path: Path) -> None:
    count_TLE = np.arange(1, 1 + 40 * 3 * 16).reshape(40, 3, 16)
    np.savez(tmp_path / "loads.npz", counts=count_TLE)
    found = traffic_of(MODEL, loads=str(tmp_path / "loads.npz"))
    assert found.share_TLE.shape == (8, 3, 16)
    first_LE = count_TLE[:5].sum(0)
    assert found.share_TLE[0] == pytest.approx(first_LE / first_LE.sum(1, keepdims=True))
    assert "40 scenarios, summed to 8" in found.source


def test_widths_of_uneven_nodes_and_slots_at_most() -> None:
    uneven = Topology(node_G=[0] * 4 + [1] * 2, speed_G=np.ones(6), slots_G=np.ones(6, dtype=int))
    assert widths(uneven, 16) == [1, 2, 6]
    assert widths(Topology.uniform(4, 2, slots=1), 16) == [1, 2, 4, 8]
    assert widths(Topology.uniform(4, 2, slots=1), 5) == [1, 2, 4]
    capped = advise(MACHINE, traffic(SKEWED), memory=40, most_slots=5)
    assert {choice.slots for choice in capped.settings} == {4, 5}
    swift = MACHINE.replace(topology=MACHINE.topology.replace(speed_G=[1, 1, 1, 2.0]))
    with pytest.raises(ProblemError, match="different speeds"):
        advise(swift, traffic(SKEWED), memory=40)


def test_break_even_is_from_where_on_it_pays() -> None:
    """Where it pays at small sizes and not above, it is not "from there on"."""
    assert _from_on(lambda size: size >= 100, 1000.0) == pytest.approx(100, rel=0.1)
    assert _from_on(lambda size: size < 10 or size >= 100, 1000.0) == pytest.approx(100, rel=0.1)
    assert _from_on(lambda size: True, 1000.0) == pytest.approx(1, rel=0.1)
    assert _from_on(lambda size: size < 900, 1000.0) is None
    assert _from(1234.0, "write", "for {} requests") == "passes that write for 1,234 requests and more"
    assert _from(None, "read", "{} tokens of prompts") == "no passes that read"


def test_live_shares_are_predicted_as_the_simulator_has_them() -> None:
    """Against passes that a backend runs with learnt times, from static's placement on: within 3 %."""
    routed = traffic(SKEWED, concentration=60.0)
    group = _Group(MACHINE, routed, 1, 40.0, np.arange(3))
    policy = Policy(name="live", summary="live", shares=TimedRule())
    slots_LGC, share_LGC = group.placed(0, "live")
    assert slots_LGC.shape == share_LGC.shape == (3, 4, 5)  # type: ignore[union-attr]
    topology = slots_of(MACHINE.topology, 5)
    scenario = Scenario(model=MODEL, topology=topology, policies=(policy,))
    backend = policy.build(group.machine, topology, scenario).backend
    backend.apply(plan(routed.share_TLE[0] * 1e6, topology))
    rng, spent = np.random.default_rng(5), []
    share_KLE = np.stack(
        [
            group.passes.routing.replace(concentration=60.0).distributions(np.array([1]), rng)[0]
            for _ in range(256)
        ]
    )
    for _ in range(120):
        mix_LE = share_KLE[rng.integers(0, 256, 64)].mean(0, dtype=np.float64)
        load_LE = rng.multinomial(128, mix_LE / mix_LE.sum(1, keepdims=True))
        before = backend.now
        backend.run(
            Passes(
                start_B=np.array([before + (10.0 if not spent else 0.0)]),
                weight_B=np.ones(1),
                tokens_B=np.array([64.0]),
                kv_tokens_B=np.array([64 * routed.held]),
                prefill_B=np.zeros(1, dtype=bool),
                load_BLE=load_LE[None].astype(float),
            )
        )
        spent.append(backend.now - before)
    assert group.pass_seconds(0.0, routed.prompt, 64.0, "live") == pytest.approx(
        np.mean(spent[20:]), rel=0.03
    )


def test_loads_are_of_the_model(tmp_path: Path) -> None:
    np.savez(tmp_path / "loads.npz", counts=np.ones((2, 3, 8)))
    with pytest.raises(ProblemError, match="has 3 layers of 8 experts, small has 3 of 16"):
        traffic_of(MODEL, loads=str(tmp_path / "loads.npz"))
    with pytest.raises(ProblemError, match="--rate: is 3, but --arrivals says it"):
        traffic_of(MODEL, arrivals="a.csv", rate=3.0)
