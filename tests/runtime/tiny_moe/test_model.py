"""The tiny MoE that ships with the package: trained, unevenly routed, and the same on every machine."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("megatron.core")

import torch

from moeless_opt.problems.errors import FormatError, ProblemError
from moeless_opt.problems.instances.tiny_moe_traces import tiny_moe_traces, tiny_moe_traces_file
from moeless_opt.runtime.checkpoint.parts import causal_positions, moe_layers
from moeless_opt.runtime.tiny_moe import model as tiny_moe
from moeless_opt.runtime.tiny_moe import train as train_tiny_moe
from moeless_opt.runtime.tiny_moe.corpus import DOMAINS, Corpus, arithmetic_text

# Stock megatron-core modules call each other in ways that they deprecate.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:megatron")

BITS = 1 / np.log(2)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_moe.load()


# ------------------------------------------------------------------------------------------ what is shipped


def test_the_files_are_small() -> None:
    assert tiny_moe.data_file(tiny_moe.WEIGHTS).stat().st_size < 16e6
    assert tiny_moe_traces_file().stat().st_size < 3e6


def test_the_card_describes_the_shipped_files() -> None:
    card, traces = tiny_moe.card(), tiny_moe_traces()
    weights = tiny_moe.data_file(tiny_moe.WEIGHTS).read_bytes()
    assert card["model"]["weights_sha256"] == hashlib.sha256(weights).hexdigest()
    for domain, row in zip(traces.domains, traces.skew_DL(), strict=True):
        np.testing.assert_allclose(card["skew_max_over_mean"][domain], row, atol=6e-4)
    np.testing.assert_allclose(card["drift_total_variation"]["matrix"], traces.drift_DD(), atol=6e-5)


def test_the_summary_shows_the_card() -> None:
    text = tiny_moe.summary()
    for domain, losses in tiny_moe.card()["held_out"].items():
        assert f"{losses['nats_per_byte']:.3f}" in text
        assert text.count(domain) >= 2


def test_the_model_is_trained() -> None:
    """On held-out text it does better than counts of what follows each two bytes of the training text."""
    for domain, losses in tiny_moe.card()["held_out"].items():
        assert losses["bits_per_byte"] < losses["counted_bits_per_byte"], domain


def test_the_yardstick_of_counts() -> None:
    """A text whose every byte follows from the two before it costs almost nothing, noise all of its bits."""
    rng = np.random.default_rng(0)
    period = np.tile(np.array([1, 1, 2, 3, 2, 1, 3, 3], np.uint8), 2000)
    noise = rng.integers(0, 4, 40_000).astype(np.uint8)
    assert train_tiny_moe.counted_bits(Corpus("", period, period[:1000], "", "")) < 0.1
    assert abs(train_tiny_moe.counted_bits(Corpus("", noise, noise[::-1][:9000], "", "")) - 2) < 0.01


def test_the_model_reads_what_any_machine_has(model: Any) -> None:
    """Text that every machine can make: sums that are new to it, and the source of a standard module."""
    sums = arithmetic_text(1024, seed=99)
    assert tiny_moe.score(model, sums).mean() * BITS < 1.9
    shuffled = bytes(np.random.default_rng(0).permutation(np.frombuffer(sums, np.uint8)))
    assert tiny_moe.score(model, shuffled).mean() > 1.5 * tiny_moe.score(model, sums).mean()
    assert tiny_moe.score(model, inspect.getsource(json.loads)).mean() * BITS < 3


# -------------------------------------------------------------------------------------------------- traces


def test_traces_are_well_formed() -> None:
    traces = tiny_moe_traces()
    T, layers, k = traces.experts_TLK.shape
    assert (layers, k) == (tiny_moe.LAYERS, tiny_moe.TOP_K)
    assert traces.offsets[0] == 0
    assert traces.offsets[-1] == T
    lengths = np.diff(traces.offsets)
    assert (lengths >= 2).all()
    assert ((traces.prompt_tokens >= 1) & (traces.prompt_tokens <= lengths)).all()
    assert traces.experts_TLK.max() < tiny_moe.EXPERTS
    assert (traces.experts_TLK[..., 0] != traces.experts_TLK[..., 1]).all()
    assert traces.domains == DOMAINS
    assert np.bincount(traces.domain).tolist() == [160] * len(DOMAINS)
    with pytest.raises(ValueError, match="read-only"):
        traces.experts_TLK[0] = 0


def test_loads_count_every_choice_once() -> None:
    traces = tiny_moe_traces()
    T = len(traces.experts_TLK)
    load_DLE = traces.load_DLE()
    assert (load_DLE.sum((0, 2)) == 2 * T).all()
    np.testing.assert_array_equal(load_DLE.sum(0), traces.load_LE())
    one = traces.request(5)
    assert traces.load_LE(np.array([5])).sum() == one.size


def test_skew_and_drift_are_real() -> None:
    """Experts are uneven, and domains differ by far more than two halves of one domain."""
    traces = tiny_moe_traces()
    assert (traces.load_LE().max(1) / traces.load_LE().mean(1)).mean() > 1.5
    drift_DD = traces.drift_DD()
    np.testing.assert_allclose(drift_DD, drift_DD.T)
    within = np.diag(drift_DD)
    between = drift_DD[~np.eye(len(drift_DD), dtype=bool)]
    assert between.min() > within.max()
    assert between.mean() > 4 * within.mean()


def test_an_unknown_domain_is_named() -> None:
    with pytest.raises(ProblemError, match="'poetry' is not one of code, english"):
        tiny_moe_traces().of_domain("poetry")


def test_traces_can_be_read_as_loads() -> None:
    from moeless_opt.problems.io.recordings.read import read_loads

    loads = read_loads(tiny_moe_traces_file())
    np.testing.assert_array_equal(loads.load_LE, tiny_moe_traces().load_LE())


# ------------------------------------------------------------------------------------------- the live model


def test_wider_types_hold_the_same_weights() -> None:
    double, half = (tiny_moe.load(dtype=d) for d in (torch.float64, torch.bfloat16))
    for (name, a), (_, b) in zip(double.named_parameters(), half.named_parameters(), strict=True):
        assert b.dtype == torch.bfloat16, name
        assert torch.equal(a, b.double()), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_compute_nearly_the_same(model: Any, dtype: torch.dtype) -> None:
    text = tiny_moe.PROMPTS["english"][0]
    other = tiny_moe.score(tiny_moe.load(dtype=dtype), text)
    assert abs(other.mean() - tiny_moe.score(model, text).mean()) < (0.1 if dtype == torch.bfloat16 else 1e-4)


def test_save_and_load(model: Any, tmp_path: Path) -> None:
    tiny_moe.save(model, tmp_path / "again.safetensors")
    again = tiny_moe.load(weights=tmp_path / "again.safetensors")
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_other_checkpoints_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"embedding.word_embeddings.weight": torch.zeros(3, 3)}, tmp_path / "x.safetensors")
    with pytest.raises(FormatError, match=r"word_embeddings.* has shape \[3, 3\], not \[258, 128\]"):
        tiny_moe.load(weights=tmp_path / "x.safetensors")


def test_score_of_nothing_and_of_long_texts(model: Any) -> None:
    assert tiny_moe.score(model, "").shape == (0,)
    text = arithmetic_text(600, seed=3)
    whole = tiny_moe.score(model, text)
    assert whole.shape == (600,)
    np.testing.assert_allclose(whole[256:512], tiny_moe.score(model, text[256:512]), rtol=1e-5, atol=1e-6)


def test_score_is_the_loss_of_the_model(model: Any) -> None:
    text = "12 + 30 = 42"
    tokens = torch.tensor([tiny_moe.encode(text)])
    with torch.no_grad():
        logits = model(tokens[:, :-1], causal_positions(tokens[:, :-1]), None)[0].double()
    wanted = -torch.log_softmax(logits, -1)[torch.arange(12), tokens[0, 1:]]
    np.testing.assert_allclose(tiny_moe.score(model, text), wanted.numpy(), rtol=1e-6)


def test_generate(model: Any) -> None:
    prompt = tiny_moe.PROMPTS["arithmetic"][0]
    greedy = tiny_moe.generate(model, prompt, 12)
    assert len(greedy) == 12
    assert greedy == tiny_moe.generate(model, prompt, 12)
    assert greedy[:6] == tiny_moe.generate(model, prompt, 6)
    assert (tiny_moe.score(model, prompt.encode() + greedy)[len(prompt) :]).mean() < np.log(256) / 2
    samples = {tiny_moe.generate(model, prompt, 12, temperature=1.0, seed=s) for s in range(3)}
    assert len(samples) > 1
    assert tiny_moe.generate(model, prompt, 12, temperature=1.0, seed=1) in samples
    assert tiny_moe.generate(model, prompt, 0) == b""


def test_generate_refuses_what_it_cannot_do(model: Any) -> None:
    with pytest.raises(ProblemError, match=r"length: must be in 0\.\.501"):
        tiny_moe.generate(model, "12 + 30 = ", 502)
    with pytest.raises(ProblemError, match="temperature: must be a number of at least 0"):
        tiny_moe.generate(model, "", 1, temperature=-1)


def test_encode_and_decode() -> None:
    assert tiny_moe.encode("é") == [256, 0xC3, 0xA9]
    assert tiny_moe.decode(tiny_moe.encode("Жизнь — это")) == "Жизнь — это"
    assert tiny_moe.decode([0xC3]) == "�"


def test_record_routes_records_what_the_routers_chose(model: Any) -> None:
    """The two experts of every token, the heavier first, sequence by sequence."""
    tokens = torch.randint(0, 256, (3, 7), generator=torch.Generator().manual_seed(0))
    seen: list[torch.Tensor] = []
    handles = [
        layer.router.register_forward_hook(lambda _m, _a, out: seen.append(out[0].clone()))
        for _, layer in moe_layers(model)
    ]
    with torch.no_grad(), tiny_moe.record_routes(model) as routes:
        model(tokens, causal_positions(tokens), None)
    for handle in handles:
        handle.remove()
    chosen_TLK = routes.concatenate().astype(np.int64)
    assert chosen_TLK.shape == (21, tiny_moe.LAYERS, tiny_moe.TOP_K)
    for layer, probs in enumerate(seen):
        probs_BSE = probs.view(7, 3, -1).transpose(0, 1).reshape(21, -1).numpy()
        weights = np.take_along_axis(probs_BSE, chosen_TLK[:, layer], axis=1)
        assert (weights[:, 0] >= weights[:, 1]).all()
        assert (weights[:, 1] > 0).all()
        assert (np.count_nonzero(probs_BSE, axis=1) == 2).all()


def test_record_routes_lets_go(model: Any) -> None:
    with tiny_moe.record_routes(model) as routes:
        pass
    tiny_moe.score(model, "x")
    assert routes.concatenate().shape == (0, tiny_moe.LAYERS, tiny_moe.TOP_K)


RANK_SCRIPT = """
import sys, torch, torch.distributed as dist, warnings
warnings.simplefilter("ignore")
rank, size = int(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", store=dist.FileStore("store", size), rank=rank, world_size=size)
from moeless_opt.runtime.tiny_moe import model as tiny_moe
model = tiny_moe.load(dtype=torch.float64)
assert sum("local_experts" in n for n, _ in model.named_parameters()) == 2 * 6 * 16 // size
torch.save(tiny_moe.score(model, f"{rank} + {rank} = "), f"score.{rank}")
dist.barrier()
dist.destroy_process_group()
"""


def test_two_ranks_compute_the_same(tmp_path: Path) -> None:
    root = str(Path(__file__).resolve().parents[3])
    env = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK_SCRIPT, str(r), "2"], cwd=tmp_path, env=env)
        for r in (0, 1)
    ]
    assert [r.wait(timeout=600) for r in ranks] == [0, 0]
    alone = tiny_moe.load(dtype=torch.float64)
    for r in range(2):
        together = torch.load(tmp_path / f"score.{r}", weights_only=False)
        # Not to the bit: an expert multiplies both ranks' tokens at once, and sums in another order.
        np.testing.assert_allclose(together, tiny_moe.score(alone, f"{r} + {r} = "), rtol=1e-12)


# ------------------------------------------------------------------------------------------------ training


def test_the_arithmetic_is_right() -> None:
    text = arithmetic_text(20_000, seed=5).decode().splitlines()[:-1]
    kinds = set()
    for line in text:
        if "," in line:
            numbers = [int(x) for x in line.split(",")]
            assert len({b - a for a, b in pairwise(numbers)}) == 1, line
            kinds.add(",")
            continue
        left, _, right = line.partition(" = ")
        parts = left.split() if right and len(left.split()) == 3 else line.split()
        a, sign, b = int(parts[0]), parts[1], int(parts[2])
        truth = {"+": a + b, "-": a - b, "*": a * b, "mod": a % b if b else None}
        assert {"<": a < b, ">": a > b, "=": a == b}[sign] if sign in "<>=" else int(right) == truth[sign], (
            line
        )
        kinds.add(sign)
    assert kinds >= {"+", "-", "*", "mod", "<", ">", ","}
    assert arithmetic_text(100, seed=5) == arithmetic_text(20_000, seed=5)[:100]


def small_corpora() -> dict[str, Corpus]:
    rng = np.random.default_rng(0)
    return {
        d: Corpus(
            d,
            rng.integers(65, 70 + i, 4000).astype(np.uint8),
            rng.integers(65, 70 + i, 900).astype(np.uint8),
            "",
            "",
        )
        for i, d in enumerate(DOMAINS)
    }


def test_the_learning_rate() -> None:
    rates = np.array([train_tiny_moe.learning_rate(s, 1000) for s in range(1001)])
    assert rates.max() == train_tiny_moe.PEAK_RATE
    assert rates[0] > 0
    assert (np.diff(rates[:101]) >= 0).all()
    np.testing.assert_allclose(rates[100:701], train_tiny_moe.PEAK_RATE)
    assert (np.diff(rates[701:]) < 0).all()
    assert rates[1000] == 0


def test_batches_follow_from_seed_and_step() -> None:
    corpora = small_corpora()
    a, b = (train_tiny_moe.window_batch(corpora, s) for s in (3, 4))
    assert torch.equal(a, train_tiny_moe.window_batch(corpora, 3))
    assert not torch.equal(a, b)
    assert (a[:, 0] == tiny_moe.START).all()
    assert ((a[:, 1:] >= 65) & (a[:, 1:] < 80)).all()


def test_training_learns_and_resumes_exactly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(train_tiny_moe, "WINDOW", 16)
    monkeypatch.setattr(train_tiny_moe, "WARM_UP", 2)
    corpora = small_corpora()
    (tmp_path / "once").mkdir()
    (tmp_path / "twice").mkdir()
    once = train_tiny_moe.train(corpora, 8, tmp_path / "once", every=4)
    steps = [json.loads(x) for x in (tmp_path / "once" / "log.jsonl").read_text().splitlines()]
    assert [s["step"] for s in steps] == [4, 8]
    assert steps[-1]["mean"] < np.log(256) - 0.5

    class Interrupted(Exception):
        pass

    draw = train_tiny_moe.window_batch

    def draw_until_6(corpora: dict[str, Corpus], step: int) -> torch.Tensor:
        if step == 6:
            raise Interrupted
        return draw(corpora, step)

    monkeypatch.setattr(train_tiny_moe, "window_batch", draw_until_6)
    with pytest.raises(Interrupted):
        train_tiny_moe.train(corpora, 8, tmp_path / "twice", every=4)
    monkeypatch.setattr(train_tiny_moe, "window_batch", draw)
    resumed = train_tiny_moe.train(corpora, 8, tmp_path / "twice", every=4)
    for (name, a), (_, b) in zip(once.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_recorded_traces_have_the_shipped_form(
    model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(train_tiny_moe, "REQUESTS_PER_DOMAIN", 2)
    arrays = train_tiny_moe.route_texts(model, small_corpora())
    with np.load(tiny_moe_traces_file()) as shipped:
        assert {k: (v.dtype, v.shape[1:]) for k, v in arrays.items()} == {
            k: (shipped[k].dtype, shipped[k].shape[1:]) for k in shipped.files
        }
    for name in ("a.npz", "b.npz"):
        train_tiny_moe.write_traces(arrays, tmp_path / name)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
