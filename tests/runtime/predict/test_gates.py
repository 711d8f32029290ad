"""Gate replay and fine-tuning, on the tiny MoE."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("megatron.core")

import torch
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

from moeless_opt.problems.errors import FormatError, ProblemError
from moeless_opt.runtime.engines.observe import replay_gate, replay_routes, tap_hidden
from moeless_opt.runtime.predict import foresight
from moeless_opt.runtime.predict.foresight import SMALL, Foresight, GatePredictor, Pending, _Recorded
from moeless_opt.runtime.predict.gates import LARGEST, PlainGate, TunedGate, plain_gates
from moeless_opt.runtime.predict.history import Calibrated, LastWindow
from moeless_opt.runtime.predict.measures import count_loads
from moeless_opt.runtime.predict.predictor import Context, TokenPredictor
from moeless_opt.runtime.predict.tuning import fine_tune, load_tuned, save_tuned, train_gate
from moeless_opt.runtime.tiny_moe import model as tiny_moe
from moeless_opt.runtime.tiny_moe.corpus import arithmetic_text
from moeless_opt.runtime.tiny_moe.scores import (
    TokenRecord,
    decode_batches,
    prefill_batches,
    record_requests,
    score_predictor,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:megatron")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_moe.load()


@pytest.fixture(scope="module")
def made(model: Any) -> TokenRecord:
    """Two domains that any machine has: 24 requests of 250 bytes each."""
    source = inspect.getsource(inspect).encode() + inspect.getsource(json).encode()
    texts = [arithmetic_text(6000, seed=9)[i * 250 : (i + 1) * 250] for i in range(24)]
    texts += [source[i * 1000 : i * 1000 + 250] for i in range(24)]
    return record_requests(model, texts, [0] * 24 + [1] * 24)


@pytest.fixture(scope="module")
def split(made: TokenRecord) -> tuple[np.ndarray, np.ndarray]:
    index = np.arange(48)
    return index[index % 3 > 0], index[index % 3 == 0]


@pytest.fixture(scope="module")
def tuned(model: Any, made: TokenRecord, split: Any) -> dict[tuple[int, int], TunedGate]:
    train, test = (made.pairs(s) for s in split)
    return fine_tune(plain_gates(model), train, test, threshold=0.7, epochs=6, batch=512).tuned


# ------------------------------------------------------------------------------------- plain replay


def test_the_recording_is_what_the_model_did(model: Any, made: TokenRecord) -> None:
    assert made.experts_TLK.shape == (48 * 251, 6, 2)
    assert made.hidden_TLH.shape == (48 * 251, 5, 128)
    with tiny_moe.record_routes(model) as routes:
        tiny_moe.score(model, arithmetic_text(6000, seed=9)[:250])
    assert np.array_equal(routes.concatenate(), made.experts_TLK[:250])


def test_distance_zero_is_the_router_itself(model: Any) -> None:
    """The gate of a layer on that layer's own state chooses what the router chose; `replay_gate` agrees."""
    states: dict[int, torch.Tensor] = {}
    tap = tap_hidden(model, lambda layer, hidden: states.__setitem__(layer, hidden))
    with tiny_moe.record_routes(model) as routes:
        tiny_moe.score(model, "12 + 30 = 42\n" * 9)
    tap.close()
    load_LE, predictor = count_loads(routes.concatenate(), 16), GatePredictor(plain_gates(model))
    for layer in range(6):
        assert np.array_equal(predictor.start(states[layer], layer, 0).load_E(), load_LE[layer])
    for layer, d in ((0, 1), (2, 3), (0, 5)):
        ahead = replay_gate(model, layer + d, states[layer]).numpy()
        assert np.array_equal(predictor.start(states[layer], layer, d).load_E(), ahead)


def test_padding_is_not_counted(model: Any, made: TokenRecord) -> None:
    hidden = made.hidden_TLH[:40, 1].float()
    predictor, real = GatePredictor(plain_gates(model)), torch.arange(40) < 25
    some, all_of_them = predictor.start(hidden, 1, 1, real), predictor.start(hidden[:25], 1, 1)
    assert some.ready
    assert np.array_equal(some.load_E(), all_of_them.load_E())
    assert some.load_E().sum() == 50


def test_foresight_sees_each_layer_coming(model: Any, made: TokenRecord) -> None:
    """Predictions made inside the forward pass are those of the recorded states."""
    predictor, begun = GatePredictor(plain_gates(model)), []
    with Foresight(model, predictor, 2, begun=lambda layer, pending: begun.append((layer, pending))) as ahead:
        tiny_moe.score(model, arithmetic_text(6000, seed=9)[:250])
    assert [layer for layer, _ in begun] == [2, 3, 4, 5]
    assert all(isinstance(pending, Pending) for _, pending in begun)
    assert ahead.load_E(0) is None
    for layer in range(2, 6):
        load_E = ahead.load_E(layer)
        assert load_E is not None
        again = predictor.start(made.hidden_TLH[:250, layer - 2].float(), layer - 2, 2).load_E()
        assert np.abs(load_E - again).sum() <= 0.02 * 500  # the recording is rounded to float16
    tiny_moe.score(model, "1")  # no longer tapped
    assert len(begun) == 4


# ------------------------------------------------------------------------------------------- tuning


def test_a_gate_starts_as_what_it_replaces(model: Any, made: TokenRecord) -> None:
    hidden = made.hidden_TLH[:99, 2].float()
    for options in ({}, {"width": 0}, {"copies": False, "width": 8}):
        gate = TunedGate.of(plain_gates(model)[3], **options)
        torch.testing.assert_close(gate.scores(hidden), plain_gates(model)[3].scores(hidden))
        assert gate.parameter_count <= LARGEST


@pytest.mark.parametrize(("hidden", "experts"), [(4096, 8), (4096, 16), (5120, 16), (7168, 256), (2048, 64)])
def test_no_gate_is_over_the_limit(hidden: int, experts: int) -> None:
    gate = TunedGate(torch.nn.RMSNorm(hidden), torch.zeros(experts, hidden), None, 2)
    assert 0 < gate.parameter_count <= LARGEST
    trained = {name for name, _ in gate.named_parameters()}
    assert ("weight_EH" in trained) == (experts * hidden < LARGEST - hidden - experts)
    assert gate.width > 0 or gate.copies


@pytest.mark.parametrize(("width", "copies"), [(0, True), (5, True), (5, False)])
def test_folded_gates_say_the_same(width: int, copies: bool) -> None:
    """Without gradients the norm's weights are in the matrices; also after these have changed."""
    torch.manual_seed(3)
    norm = torch.nn.RMSNorm(24)
    gate = TunedGate(norm, torch.randn(6, 24), torch.randn(6), 2, width=width, copies=copies)
    state = 3 * torch.randn(7, 2, 24)
    for _ in range(2):
        with torch.no_grad():
            for p in gate.parameters():
                p.add_(torch.randn_like(p))
        gate.requires_grad_(False)
        plain = gate(state)
        with torch.no_grad():
            folded = gate(state)
        assert folded.shape == (14, 6)
        torch.testing.assert_close(folded, plain)


def test_only_layers_under_the_threshold_are_trained(model: Any, made: TokenRecord, split: Any) -> None:
    train, test = (made.pairs(s) for s in split)
    gates = plain_gates(model)
    none = fine_tune(gates, train, test, threshold=0.0)
    assert none.tuned == none.after == {}
    middle = float(np.median(list(none.plain.values())))
    some = fine_tune(gates, train, test, threshold=middle, options={"width": 0}, epochs=1)
    assert set(some.after) == {pair for pair, hit in none.plain.items() if hit < middle}
    assert some.plain == none.plain
    assert set(some.tuned) <= set(some.after)


def test_fine_tuning_helps_on_other_requests(model: Any, made: TokenRecord, split: Any, tuned: Any) -> None:
    """Scored on requests that it was not trained on: tokens, and loads."""
    batches = prefill_batches(made, split[1], 10, size=4)
    plain, better = (
        score_predictor(p, made, batches, distances=(1,))
        for p in (GatePredictor(plain_gates(model)), GatePredictor(plain_gates(model), tuned))
    )
    layers = [layer + d for layer, d in tuned]
    assert layers
    assert np.nanmean(better.token_DBL[0][:, layers]) > 0.05 + np.nanmean(plain.token_DBL[0][:, layers])
    assert np.nanmean(better.distance_DBL[0][:, layers]) < 0.7 * np.nanmean(plain.distance_DBL[0][:, layers])
    same = [layer for layer in range(1, 6) if layer not in layers]
    assert np.array_equal(better.load_DBLE[0][:, same], plain.load_DBLE[0][:, same])


def test_counts_are_unbiased_on_what_was_learned(model: Any, made: TokenRecord, split: Any) -> None:
    """Trained to the end, the sum of the chances is the load (the bias' gradient is their difference)."""
    hidden, experts = made.pairs(split[0][:8])
    gate = TunedGate.of(plain_gates(model)[2], width=0)
    train_gate(gate, hidden[:, 1], experts[:, 2], epochs=60, batch=512, rate=1e-2)
    load_E = gate.chosen(hidden[:, 1]).sum(0).numpy()
    actual_E = np.bincount(experts[:, 2].numpy().ravel(), minlength=16)
    assert np.abs(load_E - actual_E).sum() < 0.02 * actual_E.sum()


def test_training_is_repeatable(model: Any, made: TokenRecord) -> None:
    hidden, experts = made.pairs(range(4))
    one, two = (
        train_gate(TunedGate.of(plain_gates(model)[1]), hidden[:, 0], experts[:, 1], epochs=1)
        for _ in range(2)
    )
    assert torch.equal(one(hidden[:, 0]), two(hidden[:, 0]))


def test_the_model_is_left_alone(model: Any, tuned: Any) -> None:
    fresh = dict(tiny_moe.load().named_parameters())
    assert all(torch.equal(p, fresh[name]) for name, p in model.named_parameters())
    assert all(p.requires_grad for p in model.parameters())


# --------------------------------------------------------------------------------------------- files


def test_saved_gates_come_back(model: Any, made: TokenRecord, tuned: Any, tmp_path: Path) -> None:
    gates = plain_gates(model)
    kept = dict(tuned) | {(0, 4): TunedGate.of(gates[4], copies=False, width=3)}
    save_tuned(kept, tmp_path / "gates.safetensors")
    back = load_tuned(tmp_path / "gates.safetensors", gates)
    assert set(back) == set(kept)
    for pair, gate in kept.items():
        hidden = made.hidden_TLH[:50, pair[0]]
        assert torch.equal(back[pair](hidden), gate(hidden))
        assert back[pair].parameter_count == gate.parameter_count


def test_files_of_others_are_refused(model: Any, tuned: Any, tmp_path: Path) -> None:
    gates = plain_gates(model)
    with pytest.raises(FormatError, match="not a file of predictors"):
        load_tuned(tiny_moe.data_file(tiny_moe.WEIGHTS), gates)
    save_tuned({(4, 1): TunedGate.of(gates[5])}, tmp_path / "x")
    with pytest.raises(FormatError, match="layer 5, the model has 3"):
        load_tuned(tmp_path / "x", gates[:3])
    other = TunedGate(torch.nn.RMSNorm(64), torch.zeros(16, 64), None, 2)
    save_tuned({(0, 1): other}, tmp_path / "y")
    with pytest.raises(FormatError, match="shape"):
        load_tuned(tmp_path / "y", gates)


# ------------------------------------------------------------------------------------------- scores


class Oracle:
    """Knows the next layer of the tokens at hand by their states."""

    name = "oracle"

    def __init__(self, made: TokenRecord) -> None:
        self.made, self.asked = made, 0

    def predict(self, context: Context, distance: int) -> Any:
        self.asked += 1
        state = context.hidden[-1].half()  # the first token is the start of every text
        last = int((self.made.hidden_TLH[:, context.layer] == state).all(1).nonzero()[0])
        rows = slice(last + 1 - len(context.hidden), last + 1)
        return count_loads(self.made.experts_TLK[rows], 16)[context.layer + distance]

    def observe(self, load_LE: Any) -> None:
        self.seen = load_LE


def test_an_oracle_scores_best(made: TokenRecord) -> None:
    oracle = Oracle(made)
    batches = [made.rows([i]) for i in (3, 30)]
    scores = score_predictor(oracle, made, batches, distances=(1, 3))
    assert oracle.asked == 2 * (5 + 3)
    assert np.nanmax(scores.distance_DBL) == 0
    assert np.nanmin(scores.top_DBL) == 1
    assert np.isnan(scores.token_DBL).all()
    assert np.isnan(scores.distance_DBL[1]).all()
    assert np.isfinite(scores.distance_DBL[2, :, 3:]).all()
    assert np.array_equal(oracle.seen, count_loads(made.experts_TLK[batches[1]], 16))


def test_batches_are_requests_and_tokens(made: TokenRecord) -> None:
    requests = np.arange(0, 48, 3)
    for rows in prefill_batches(made, requests, 5, size=3):
        assert len(rows) == 3 * 251
        assert set(rows // 251) <= set(requests.tolist())
    last: Any = None
    for rows in decode_batches(made, requests, 300, size=9):
        assert len(rows) == 9
        assert set(rows // 251) <= set(requests.tolist())
        if last is not None:  # each goes on, or its request is over and another begins
            begins = np.isin(rows, made.offsets[:-1]) & np.isin(last + 1, made.offsets[1:])
            assert ((rows == last + 1) | begins).all()
        last = rows


def test_traffic_dwells_on_one_domain_then_moves_on(made: TokenRecord) -> None:
    batches = prefill_batches(made, np.arange(48), 40, size=8, dwell=20)
    share = np.array([np.mean(rows // 251 < 24) for rows in batches])
    assert abs(share[:20].mean() - share[20:].mean()) > 0.3


def test_gates_are_predictors(model: Any, made: TokenRecord) -> None:
    predictor = GatePredictor(plain_gates(model))
    assert isinstance(predictor, TokenPredictor)
    scores = score_predictor(Calibrated(predictor), made, [made.rows([0])], distances=(1,))
    assert scores.name == "gate calibrated"
    assert np.isfinite(scores.distance_DBL[0, 0, 1:]).all()
    assert score_predictor(LastWindow(), made, [made.rows([0])], distances=(1,), warm_up=1).name == "last"


@pytest.mark.parametrize("distance", [6, -1])
def test_bad_distances_are_refused(model: Any, distance: int) -> None:
    with pytest.raises(ProblemError, match="distance"):
        GatePredictor(plain_gates(model)).start(torch.zeros(1, 128), 0, distance)


def test_bad_input_is_named(model: Any) -> None:
    gates = plain_gates(model)
    with pytest.raises(ProblemError, match="hidden"):
        GatePredictor(gates).predict(Context(layer=0, load_E=np.ones(16)), 1)
    with pytest.raises(ProblemError, match="width"):
        TunedGate.of(gates[0], width=10_000)
    with pytest.raises(ProblemError, match="copies"):
        TunedGate(torch.nn.RMSNorm(7168), torch.zeros(256, 7168), None, 8, copies=True)
    with pytest.raises(ProblemError, match="hidden"):
        train_gate(TunedGate.of(gates[0]), torch.zeros(2, 128), torch.zeros(3, 2))
    with pytest.raises(ProblemError, match="texts"):
        record_requests(model, [], [])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_predictions_run_beside_the_forward_pass() -> None:
    model = tiny_moe.load("cuda")
    predictor = GatePredictor(plain_gates(model))
    hidden = torch.randn(512, 128, device="cuda")
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)  # keeps the main stream busy
    hidden.mul_(2)
    pending = predictor.start(hidden, 0, 1)
    assert not pending.ready
    assert np.array_equal(pending.load_E(), replay_gate(model, 1, hidden).cpu().numpy())


class Again:
    """Stands for CUDA graphs: what was recorded reads the memory that it read then, into the same tensor."""

    def __init__(self) -> None:
        self.made = 0

    def record(self, call: Any) -> Any:
        self.made += 1
        (gate,) = (
            cell.cell_contents for cell in call.__closure__ if isinstance(cell.cell_contents, PlainGate)
        )
        weights = {
            (module, name): tensor.detach()
            for module in (gate.norm, gate.router)
            for name, tensor in module.named_parameters()
        }
        out = torch.zeros_like(call(None))

        def launch() -> None:
            now = {key: key[0]._parameters[key[1]] for key in weights}
            for (module, name), tensor in weights.items():
                module._parameters[name] = torch.nn.Parameter(tensor, requires_grad=False)
            out.copy_(call(None))
            for (module, name), tensor in now.items():
                module._parameters[name] = tensor

        return [launch], out


def test_recorded_predictions_are_those_of_the_gates(model: Any) -> None:
    recorder = Again()
    recorded = _Recorded(recorder)
    gate = plain_gates(model)[1]
    with torch.no_grad():
        for seed in range(6):
            hidden = torch.randn((5, 1, 128), generator=torch.Generator().manual_seed(seed))
            found = recorded.counts_E(gate, hidden, None)
            assert (found is None) == (seed < 2)
            if found is not None:
                assert found.tolist() == gate.chosen(hidden).sum(0, dtype=torch.float32).tolist()
            assert recorded.counts_E(TunedGate.of(gate), hidden, None) is None
    assert recorder.made == 1


@torch.no_grad()
def test_recorded_predictions_follow_weights_and_gates() -> None:
    model = tiny_moe.load()
    recorder, hidden = Again(), torch.randn((5, 1, 128), generator=torch.Generator().manual_seed(1))
    recorded = _Recorded(recorder)
    gate = plain_gates(model)[1]

    def right(times: int, made: int) -> None:
        for _ in range(times):
            found = recorded.counts_E(gate, hidden, None)
            assert found is None or found.tolist() == gate.counts_E(hidden).tolist()
        assert found is not None
        assert recorder.made == made

    right(3, 1)
    gate.router.weight.copy_(gate.router.weight.flip(0))  # where they lie
    right(1, 1)
    gate.router.weight = torch.nn.Parameter(gate.router.weight.flip(0))
    right(1, 2)
    gate.norm.weight.data = torch.rand(128)
    right(1, 3)
    # A gate that goes leaves its id to nobody.
    for made in range(4, 8):
        gate = plain_gates(tiny_moe.load())[made % 3]
        right(3, made)


def test_large_predictions_are_not_recorded(model: Any) -> None:
    recorder, gate = Again(), plain_gates(model)[1]
    recorded, hidden = _Recorded(recorder), torch.zeros(1, 128).expand(SMALL // 128 + 1, 128)
    assert [recorded.counts_E(gate, hidden, None) for _ in range(4)] == [None] * 4
    assert recorder.made == 0


def test_gates_are_made_while_routes_are_replayed(model: Any) -> None:
    routes_TLK = np.tile(np.arange(2), (70, 6, 1))
    with replay_routes(model) as replay:
        replay.load(routes_TLK)
        gates = plain_gates(model)
        assert all(gate.router.router_replay is not None for gate in gates)
    hidden = torch.randn((5, 128), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert gates[2].counts_E(hidden).tolist() == plain_gates(model)[2].counts_E(hidden).tolist()
    routers = [gate.router for gate in gates]
    known = list(RouterReplay.global_router_replay_instances)
    for router in routers:
        router.router_replay = RouterReplay()
        router.router_replay.set_router_replay_action(RouterReplayAction.RECORD)
    try:
        plain_gates(model)
        assert all(router.router_replay.recorded_topk_idx is None for router in routers)
    finally:
        RouterReplay.global_router_replay_instances[:] = known
        for router in routers:
            router.router_replay = None


def test_recordings_together_keep_so_much_at_most(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Once:
        def record(self, call: Any) -> Any:
            out = call(None)
            return [lambda: None], out

    monkeypatch.setattr(foresight, "HELD", 3 * 128)
    recorded, gate = _Recorded(Once()), plain_gates(model)[1]
    with torch.no_grad():
        for tokens, kept in ((2, True), (2, True), (3, False), (1, True)):
            found = [recorded.counts_E(gate, torch.ones(tokens, 128), None) for _ in range(4)]
            assert (found[-1] is not None) == kept
