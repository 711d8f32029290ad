"""The plug-in for SGLang, against stand-ins of SGLang's modules."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from moeless_opt.adapters import planner
from moeless_opt.adapters.policy import first_map
from moeless_opt.adapters.sglang import register_sglang
from tests.adapters.engine_fakes import EplbAlgorithm, HookType, fake_sglang

LAYERS, DENSE, EXPERTS, GPUS, WIDTH = 4, 1, 16, 4, 5
SLOTS = GPUS * WIDTH
TARGET = "sglang.srt.eplb.eplb_algorithms.rebalance_experts"


def loads(seed: int, steps: int = 2) -> torch.Tensor:
    """Tokens [steps, layers, experts]; dense layers serve none."""
    rng = np.random.default_rng(seed)
    load = (1000 * rng.lognormal(0, 1, (steps, LAYERS, EXPERTS))).astype(np.int64)
    load[:, :DENSE] = 0
    return torch.from_numpy(load)


def metadata(p2l: Any) -> SimpleNamespace:
    return SimpleNamespace(physical_to_logical_map_cpu=torch.as_tensor(p2l))


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Switch the plug-in on with options; what replaces SGLang's function, and what is live."""

    def switch(dispatch: str = "dynamic", **options: Any) -> SimpleNamespace:
        sglang = fake_sglang(monkeypatch, dispatch)
        monkeypatch.setenv("MOELESS_SGLANG", "1")
        for name, value in ({"planner": "thread"} | options).items():
            monkeypatch.setenv(f"MOELESS_SGLANG_{name.upper()}", str(value))
        register_sglang()
        hook, kind = sglang.hooks[TARGET]
        assert kind is HookType.REPLACE

        def ask(load: torch.Tensor, algorithm: EplbAlgorithm = EplbAlgorithm.deepseek) -> Any:
            return hook(
                tokens_per_expert=load,
                num_physical_experts=SLOTS,
                num_local_physical_experts=WIDTH,
                num_groups=None,
                num_nodes=2,
                algorithm=algorithm,
            )

        return SimpleNamespace(ask=ask, now=sglang.now, hooks=sglang.hooks)

    return switch


def check_contract(found: Any) -> None:
    p2l, l2p, count = found
    assert p2l.dtype == l2p.dtype == count.dtype == torch.int64
    assert p2l.shape == (LAYERS, SLOTS)
    assert l2p.shape[:2] == count.shape == (LAYERS, EXPERTS)
    assert l2p.shape[2] <= SLOTS
    assert int(p2l.min()) >= 0
    assert int(count.min()) >= 1
    assert torch.equal((l2p >= 0).sum(-1), count)
    for layer, expert in np.ndindex(LAYERS, EXPERTS):
        own = l2p[layer, expert][: int(count[layer, expert])]
        assert (p2l[layer][own] == expert).all()


@pytest.mark.parametrize("value", [None, "0"])
def test_nothing_happens_unless_asked(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    sglang = fake_sglang(monkeypatch)
    monkeypatch.delenv("MOELESS_SGLANG", raising=False)
    if value is not None:
        monkeypatch.setenv("MOELESS_SGLANG", value)
    register_sglang()
    assert not sglang.hooks


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("ENTRIES", "64", "option entries is for vLLM"),
        ("PLAN", "plan.json", "--init-expert-location"),
        ("BUDGET", "3", "'budget' is unknown"),
    ],
)
def test_wrong_options_end_the_engine(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str
) -> None:
    """SGLang logs and swallows any error of a plug-in, and would go on without it."""
    fake_sglang(monkeypatch)
    monkeypatch.setenv("MOELESS_SGLANG", "1")
    monkeypatch.setenv(f"MOELESS_SGLANG_{name}", value)
    with pytest.raises(SystemExit, match=words):
        register_sglang()


def test_at_the_start_nothing_is_live(on: Any) -> None:
    sglang = on()
    check_contract(sglang.ask(loads(1)))
    sglang.now.metadata = metadata(np.zeros((LAYERS, SLOTS + GPUS), dtype=int))  # of another size
    check_contract(sglang.ask(loads(1)))


@pytest.mark.parametrize("dispatch", ["dynamic", "static", "lp", "fake"])
def test_few_moves_from_what_is_live(on: Any, dispatch: str) -> None:
    sglang, live = on(dispatch), torch.from_numpy(first_map(LAYERS, EXPERTS, SLOTS))
    sglang.now.metadata = metadata(live)
    found = sglang.ask(loads(2))
    check_contract(found)
    assert torch.equal(found[0][:DENSE], live[:DENSE])
    assert not torch.equal(found[0], live)
    sglang.now.metadata = metadata(found[0])
    assert torch.equal(sglang.ask(loads(2))[0], found[0])


def test_steps_are_summed(on: Any) -> None:
    sglang = on()
    load = loads(3, 3)
    assert torch.equal(sglang.ask(load)[0], sglang.ask(load.sum(0, keepdim=True))[0])


def test_ranks_that_are_lost_serve_nothing(on: Any) -> None:
    sglang = on()
    sglang.now.metadata = metadata(first_map(LAYERS, EXPERTS, SLOTS))
    sglang.now.ranks = SimpleNamespace(active_ranks=torch.tensor([1, 1, 0, 1]))
    lost = slice(2 * WIDTH, 3 * WIDTH)
    with pytest.raises(AssertionError):  # 15 slots for 16 experts
        check_contract(sglang.ask(loads(4), EplbAlgorithm.elasticity_aware))
    few = loads(4)[:, :, :12]
    sglang.now.metadata = metadata(first_map(LAYERS, 12, SLOTS))
    p2l, l2p, count = sglang.ask(few, EplbAlgorithm.elasticity_aware)
    assert (p2l[:, lost] == 0).all()
    assert not ((l2p >= lost.start) & (l2p < lost.stop)).any()
    assert int(count.min()) >= 1
    assert (count.sum(1) == 3 * WIDTH).all()
    # Another algorithm knows nothing of lost ranks.
    assert (sglang.ask(few)[2].sum(1) == SLOTS).all()


def test_an_error_leaves_the_live_map(
    on: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug of ours")

    sglang, live = on(), torch.from_numpy(first_map(LAYERS, EXPERTS, SLOTS)).flip(1)
    monkeypatch.setattr(planner.PlannerProcess, "plan", broken)
    with caplog.at_level(logging.ERROR):
        check_contract(sglang.ask(loads(5)))
        sglang.now.metadata = metadata(live)
        found = sglang.ask(loads(5))
    check_contract(found)
    assert torch.equal(found[0], live)
    assert "the live map stays" in caplog.text


def test_the_planner_begins_with_the_balancer(on: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []
    monkeypatch.setattr(planner.PlannerProcess, "begin", lambda self: begun.append(self))
    hook, kind = on().hooks["sglang.srt.eplb.eplb_manager.EPLBManager.__init__"]
    assert kind is HookType.AFTER
    assert hook(None, "self", model_config=None) is None
    assert len(begun) == 1
