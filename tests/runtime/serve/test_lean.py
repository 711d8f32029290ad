"""The short ways of a pass give what the long ones give."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("megatron.core")

import numpy as np  # noqa: E402

from moeless_opt.runtime.checkpoint.parts import NeutralRouter  # noqa: E402
from moeless_opt.runtime.engines.attach import attach  # noqa: E402
from moeless_opt.runtime.engines.router_choice import RouterChoice  # noqa: E402
from moeless_opt.runtime.live.dispatch.dispatcher import chosen_experts  # noqa: E402
from moeless_opt.runtime.serve.engine.lean import LeanDecoder  # noqa: E402
from moeless_opt.runtime.tiny_moe import model as tiny  # noqa: E402

KINDS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "before the choice": {"moe_router_pre_softmax": True},
    "one expert": {"moe_router_topk": 1, "moe_router_pre_softmax": True},
    "four of them": {"moe_router_topk": 4},
    "sigmoid": {"moe_router_score_function": "sigmoid", "moe_router_topk_scaling_factor": 2.5},
    "sigmoid with a bias": {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_topk": 3,
    },
    "in float64": {"moe_router_dtype": "fp64"},
}


def made_router(**fields: Any) -> Any:
    torch.manual_seed(0)
    router = tiny.new_model(tiny.config(num_layers=1, **fields)).decoder.layers[0].mlp.router.eval()
    assert type(router) is NeutralRouter
    if router.expert_bias is not None:
        router.expert_bias.copy_(torch.randn(tiny.EXPERTS))
    return router


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_routers_choose_the_same_as_indices(kind: str) -> None:
    router = made_router(**KINDS[kind])
    routes = RouterChoice(router)
    assert not routes.asked()
    x = torch.randn(50, 1, tiny.HIDDEN)
    probs, routing_map = router(x)
    expert_Tk, prob_Tk = routes(x)
    wanted_Tk = chosen_experts(routing_map, router.topk)
    assert torch.equal(expert_Tk, wanted_Tk)
    assert torch.equal(prob_Tk, probs.gather(1, wanted_Tk))


def test_what_is_not_repeated_is_asked_for() -> None:
    groups = made_router(
        moe_router_score_function="sigmoid", moe_router_num_groups=4, moe_router_group_topk=2
    )
    assert RouterChoice(groups).asked()
    assert RouterChoice(made_router(moe_router_load_balancing_type="sinkhorn")).asked()
    routes = RouterChoice(made_router())
    handle = routes.router.register_forward_hook(lambda *_: None)
    assert routes.asked()
    handle.remove()
    assert not routes.asked()


@pytest.mark.parametrize("experts", ["grouped", "loop"])
@torch.no_grad()
def test_one_rank_sorts_at_once_as_in_steps(experts: str) -> None:
    model = tiny.load()
    live = attach(model, experts=experts)
    # Another order of slots than that of the experts.
    live.apply(live.slots_LGC[:, :, ::-1].copy())
    live.settle()
    tokens = torch.tensor([tiny.encode("one rank sorts at once")])
    position = torch.arange(tokens.size(1))[None]
    valid = torch.arange(tokens.size(1)) % 3 > 0
    seen = []
    for block in (1, 2):  # padded batches are sorted in steps
        for dispatcher in live.dispatchers:
            dispatcher.row_block = block
        with live.real_tokens(valid, skip=True):
            logits = model(tokens, position, None)
        assert all(d._sorted_here == (block == 1) for d in live.dispatchers)
        observed = live.observe()
        sends = np.stack([d.sends_RP for d in live.dispatchers])
        seen.append((logits, observed.load_LE, sends, [d.back_kT for d in live.dispatchers]))
    # A padded batch is rounded in another way.
    torch.testing.assert_close(seen[0][0][0, valid], seen[1][0][0, valid], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(seen[0][1], seen[1][1])
    np.testing.assert_array_equal(seen[0][2], seen[1][2])


@torch.no_grad()
def test_norms_of_queries_and_keys_follow_their_weights() -> None:
    model = tiny.new_model(tiny.config(num_layers=1, qk_layernorm=True)).eval()
    attend, norm = LeanDecoder(model)._attend_L[0], model.decoder.layers[0].self_attention.k_layernorm
    assert attend is not None
    assert attend.joint
    assert attend.normed
    x = torch.randn(3, 1, tiny.HIDDEN, generator=torch.Generator().manual_seed(1))
    key = attend._together(x, None)[1]
    norm.weight.mul_(-2)
    torch.testing.assert_close(attend._together(x, None)[1], -2 * key)
    norm.weight = torch.nn.Parameter(norm.weight * 2)
    torch.testing.assert_close(attend._together(x, None)[1], -4 * key)
