"""Which engine takes a model, and what other packages add."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from moeless_opt.problems.errors import ProblemError, UnsupportedFeatureError  # noqa: E402
from moeless_opt.runtime.engines import attach as attaching  # noqa: E402
from moeless_opt.runtime.engines.attach import attach  # noqa: E402
from moeless_opt.runtime.live.adopt import Adopted, AttachOptions  # noqa: E402
from moeless_opt.runtime.live.dispatch.dispatcher import SlotDispatcher  # noqa: E402
from moeless_opt.runtime.live.experts import MemoryMeter, SlotBank  # noqa: E402

EXPERTS, HIDDEN = 4, 6


class Plain(torch.nn.Module):
    """A model of an engine that this package does not know: two MoE layers of matrices, numbers 2 and 5."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weights = torch.randn(2, EXPERTS, HIDDEN, HIDDEN, dtype=torch.float64)
        self.cores: Any = None

    def forward(self, x: Any) -> Any:
        for layer in range(2):
            expert_Tk = x[:, :EXPERTS].topk(2, dim=1).indices.sort(dim=1).values
            prob_Tk = torch.full(expert_Tk.shape, 0.5, dtype=x.dtype)
            if self.cores is None:
                done = torch.einsum("th,tkho->tko", x, self.weights[layer][expert_Tk])
                x = (done * prob_Tk[:, :, None]).sum(1)
            else:
                core, bank = self.cores[0][layer], self.cores[1][layer]
                rows, probs = core.send(*core.prepare(x, expert_Tk, prob_Tk))
                rows, sizes, probs = core.sort_in(rows, probs)
                parts = torch.split(rows, sizes.tolist())
                done = torch.cat([p @ bank.resident[e][0] for e, p in zip(bank.order, parts, strict=True)])
                x = core.combine(core.send_back(core.sort_out(done * probs[:, None])))
        return x


class PlainEngine:
    """The adapter, as another package would write it."""

    def accepts(self, model: Any) -> bool:
        return isinstance(model, Plain)

    def adopt(self, model: Plain, options: AttachOptions) -> Adopted:
        meter, device = MemoryMeter(options.memory_limit), torch.device("cpu")
        banks = [
            SlotBank(n, {e: [w[e]] for e in range(EXPERTS)}, [w[0]], device, meter)
            for n, w in zip((2, 5), model.weights, strict=True)
        ]

        def install(dispatchers: list[SlotDispatcher], most_rows: int | None) -> None:
            model.cores = (dispatchers, banks)

        return Adopted(
            model=model,
            group=options.group(device),
            layers=[2, 5],
            experts=EXPERTS,
            topk=2,
            hidden=HIDDEN,
            banks=banks,
            meter=meter,
            run_experts=lambda index, rows, sizes: None,
            install=install,
            restore=lambda: setattr(model, "cores", None),
        )


def point(name: str, value: str, loads: Callable[[], Any]) -> Any:
    return SimpleNamespace(name=name, value=value, load=loads)


def broken() -> Any:
    raise ImportError("no module named 'cuda'")


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Entry points that other packages declare."""
    found: list[Any] = []

    def entry_points(group: str) -> list[EntryPoint]:
        assert group == "moeless_opt.engines"
        return found

    monkeypatch.setattr(attaching, "entry_points", entry_points)
    return found


def test_another_package_brings_an_engine(others: list[Any]) -> None:
    others.append(point("plain", "elsewhere:PlainEngine", PlainEngine))
    model, x = Plain(), torch.randn(9, HIDDEN, dtype=torch.float64)
    want = model(x)
    live = attach(model, shares="equal")
    assert live.layers == (2, 5)
    assert torch.allclose(model(x), want, atol=1e-12)
    assert live.last_load_E(5).sum() == 18
    with pytest.raises(ProblemError, match=r"layer: is 0, there are 2 MoE layers: \[2, 5\]"):
        live.open_layer(0)
    ticket = live.open_layer(5)
    assert ticket is not None
    assert ticket.layer == 5
    live.offer_layer(ticket, ticket.base_GC)
    live.tick()
    assert live.layer_plan(ticket.number).status == "done"
    live.detach()
    assert model.cores is None


def test_a_broken_engine_is_a_warning_and_others_still_work(others: list[Any]) -> None:
    others += [
        point("broken", "elsewhere:gone", broken),
        point("half", "elsewhere:Half", lambda: SimpleNamespace(accepts=lambda model: True)),
        point("plain", "elsewhere:PlainEngine", PlainEngine),
    ]
    with (
        pytest.warns(RuntimeWarning, match="engine 'broken'.*no module named 'cuda'"),
        pytest.warns(RuntimeWarning, match=r"engine 'half'.*it has no adopt\(\)"),
    ):
        attach(Plain()).detach()


def test_a_model_of_no_engine_and_an_unknown_option_are_named(others: list[Any]) -> None:
    with pytest.raises(UnsupportedFeatureError, match="Linear is no model with experts of transformers"):
        attach(torch.nn.Linear(2, 2))
    with pytest.raises(ProblemError, match="row_blok: is no option of attach; there are shares, home"):
        attach(torch.nn.Linear(2, 2), row_blok=4)


@pytest.mark.parametrize(
    "options",
    [
        {"timeout": 0},
        {"timeout": float("nan")},
        {"timeout": "30"},
        {"row_block": 0},
        {"row_block": 2.5},
        {"memory_limit": -5},
        {"checksums": "no"},
        {"staged": None},
        {"home": "folder"},
        {"links": 3},
        {"places": 8, "experts": "loop"},
    ],
)
def test_options_without_a_meaning_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ProblemError, match=f"^{next(iter(options))}: is "):
        AttachOptions(**options)
