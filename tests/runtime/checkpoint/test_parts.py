"""The device-neutral megatron-core parts against the stock ones, and against plain formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("megatron.core")

import torch
import torch.nn.functional as F

from moeless_opt.problems.errors import UnsupportedFeatureError
from moeless_opt.runtime.checkpoint.parts import (
    MLATransformerConfig,
    NeutralRotary,
    NeutralRouter,
    RotaryEmbedding,
    SdpaCoreAttention,
    TransformerConfig,
    build_gpt,
    causal_positions,
    cpu_capable_layer_spec,
    ensure_model_parallel,
    get_default_pg_collection,
    moe_layers,
    neutral_config_fields,
    quiet_config,
)

# Stock megatron-core modules call each other in ways that they deprecate.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:megatron")


def config(kind: type[Any] = TransformerConfig, **overrides: Any) -> Any:
    ensure_model_parallel()
    fields: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 4,
        "num_moe_experts": 4,
        "moe_router_topk": 2,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "moe_router_load_balancing_type": "none",
    }
    return quiet_config(kind, **neutral_config_fields(**{**fields, **overrides}))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_angles(interleaved: bool) -> None:
    """Position times frequency, twice (in halves, or as neighbours), with the stock frequencies."""
    stock = RotaryEmbedding(8, 1.0, rotary_base=100, use_cpu_initialization=True)
    ours = NeutralRotary.plain(8, 100.0, interleaved=interleaved)
    torch.testing.assert_close(ours.inv_freq, stock.inv_freq)
    angles = ours(5, 3)[:, 0, 0]
    wanted = stock.get_freqs_non_repeated(5, 3)
    pairs = angles.view(5, 4, 2) if interleaved else angles.view(5, 2, 4).transpose(1, 2)
    for copy in range(2):
        torch.testing.assert_close(pairs[..., copy], wanted)


def test_rotary_angles_stay_float32_when_the_model_is_cast() -> None:
    rotary = NeutralRotary.plain(8, 1e4)
    before = rotary(1000).clone()
    cast = torch.nn.Sequential(rotary).to(torch.bfloat16)[0]
    assert cast.inv_freq.dtype == torch.float32
    assert torch.equal(cast(1000), before)


def test_rotary_tables_do_not_grow_without_end() -> None:
    rotary = NeutralRotary.plain(8, 1e4)
    for length in range(1, 200):
        rotary(length)
    assert len(rotary._tables) <= 32


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention written out, [S, B, heads, width]."""
    repeat = q.size(2) // k.size(2)
    k, v = (x.repeat_interleave(repeat, dim=2) for x in (k, v))
    logits = torch.einsum("sbhd,tbhd->bhst", q, k) * scale
    weights = logits.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("bhst,tbhd->sbhd", weights, v).flatten(2)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_core_attention(groups: int, scale: float | None) -> None:
    g = torch.Generator().manual_seed(0)
    q = torch.randn(6, 2, 4, 8, generator=g)
    k = torch.randn(6, 2, groups, 8, generator=g)
    v = torch.randn(6, 2, groups, 5, generator=g)
    core = SdpaCoreAttention(config(), 1, None, "self", softmax_scale=scale).eval()
    causal = torch.ones(6, 6, dtype=torch.bool).triu(1)
    wanted = attention(q, k, v, causal, scale or 8**-0.5)
    torch.testing.assert_close(core(q, k, v, None), wanted)
    torch.testing.assert_close(core(q, k, v, causal[None, None]), wanted)
    last = core(q[-1:], k, v, None)  # one new token sees all that came before
    torch.testing.assert_close(last, wanted[-1:])


def test_the_router_is_a_top_k_of_its_logits() -> None:
    chosen = config(num_moe_experts=8)
    router = NeutralRouter(chosen, get_default_pg_collection()).eval()
    x = torch.randn(5, 3, 32, generator=torch.Generator().manual_seed(0))
    probs, routing_map = router(x)
    logits = (x @ router.weight.T).view(15, 8)
    top = logits.topk(2, dim=1)
    torch.testing.assert_close(probs.gather(1, top.indices), top.values.softmax(1))
    assert torch.equal(routing_map, torch.zeros_like(routing_map).scatter(1, top.indices, True))


def test_the_router_computes_in_the_type_that_is_asked_for() -> None:
    ensure_model_parallel()
    router = NeutralRouter(config(moe_router_dtype="fp64"), get_default_pg_collection())
    assert router.gating(torch.zeros(1, 1, 32, dtype=torch.bfloat16)).dtype == torch.float64


def test_expert_bias_is_a_saved_float32_buffer() -> None:
    chosen = config(moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True)
    router = NeutralRouter(chosen, get_default_pg_collection()).eval()
    assert router.expert_bias.dtype == torch.float32
    assert "expert_bias" in router.state_dict()
    assert "local_tokens_per_expert" not in router.state_dict()
    router.expert_bias[2] = 100.0  # the bias decides the choice, not the weight
    probs, routing_map = router(torch.randn(5, 1, 32))
    assert routing_map[:, 2].all()
    assert probs.max() <= 1


@pytest.mark.parametrize(("freq", "wanted"), [(1, [0, 1, 2, 3]), (2, [0, 2]), ([0, 1, 1, 0], [1, 2])])
def test_layers_with_experts(freq: int | list[int], wanted: list[int]) -> None:
    model = build_gpt(config(num_layers=4, moe_layer_freq=freq), 16, 32)
    assert [i for i, _ in moe_layers(model)] == wanted


def test_one_flag_per_layer_is_wanted() -> None:
    with pytest.raises(ValueError, match="shorter"):
        cpu_capable_layer_spec(config(), qk_l2_norm=[True])


def test_a_dense_model() -> None:
    model = build_gpt(config(num_moe_experts=None), 16, 32)
    tokens = torch.arange(6)[None]
    assert moe_layers(model) == []
    assert model(tokens, causal_positions(tokens), None).shape == (1, 6, 16)


def test_the_model_is_causal_and_batch_independent() -> None:
    torch.manual_seed(0)
    model = build_gpt(config(init_method_std=0.3, params_dtype=torch.float64), 16, 32).double()
    tokens = torch.randint(0, 16, (3, 12))
    with torch.no_grad():
        whole = model(tokens, causal_positions(tokens), None)
        first = model(tokens[:, :7], causal_positions(tokens[:, :7]), None)
        alone = model(tokens[1:2], causal_positions(tokens[1:2]), None)
    torch.testing.assert_close(whole[:, :7], first, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(whole[1:2], alone, rtol=1e-10, atol=1e-12)


def test_gradients_reach_every_part() -> None:
    torch.manual_seed(0)
    model = build_gpt(config(init_method_std=0.3, moe_router_load_balancing_type="aux_loss"), 16, 32).train()
    tokens = torch.randint(0, 16, (4, 24))
    logits = model(tokens[:, :-1], causal_positions(tokens[:, :-1]), None)
    F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name


def test_a_gradient_against_differences() -> None:
    """The router's gradient, through our own code (megatron's soft-max is float32: so a wide step)."""
    torch.manual_seed(0)
    chosen = config(init_method_std=0.3, params_dtype=torch.float64)
    model = build_gpt(chosen, 16, 32).double()
    tokens = torch.randint(0, 16, (2, 9))
    weight = moe_layers(model)[0][1].router.weight

    def loss() -> torch.Tensor:
        logits = model(tokens[:, :-1], causal_positions(tokens[:, :-1]), None)
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    loss().backward()
    for row, column in ((0, 0), (1, 5), (3, 31)):
        step, found = 1e-3, []
        for sign in (1, -1):
            with torch.no_grad():
                weight[row, column] += sign * step
                found.append(float(loss()))
                weight[row, column] -= sign * step
        np.testing.assert_allclose(
            (found[0] - found[1]) / (2 * step), weight.grad[row, column], rtol=1e-2, atol=1e-4
        )


def test_bent_frequencies_of_latent_attention_are_handed_over() -> None:
    chosen = config(MLATransformerConfig, multi_latent_attention=True, rope_type="yarn", num_moe_experts=None)
    with pytest.raises(UnsupportedFeatureError, match="rope_type 'yarn'"):
        build_gpt(chosen, 16, 32)
