"""The token split: quotas, routes, and one rank's dispatch; no processes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from moeless_opt.problems.errors import ProblemError, UnsupportedFeatureError  # noqa: E402
from moeless_opt.problems.spec import TimeModel  # noqa: E402
from moeless_opt.runtime.live.dispatch.dispatcher import SlotDispatcher, chosen_experts  # noqa: E402
from moeless_opt.runtime.live.dispatch.routes import source_aware  # noqa: E402
from moeless_opt.runtime.live.dispatch.shares import (  # noqa: E402
    BalancedShares,
    EqualShares,
    PlannedShares,
    SharePolicy,
    pour,
    warm_split,
)
from moeless_opt.runtime.live.dispatch.timed import TimedShares  # noqa: E402
from moeless_opt.runtime.live.experts import checksum  # noqa: E402
from moeless_opt.runtime.live.groups import ExpertGroup  # noqa: E402
from moeless_opt.runtime.live.rows import default_row_block, pieces  # noqa: E402
from moeless_opt.runtime.live.slots import SlotTable, rows_to_slots, static_slots  # noqa: E402

# Not in an example: those have a deadline.
warm_split()


@st.composite
def layers(draw: st.DrawFn) -> tuple[SlotTable, np.ndarray, list[int]]:
    """A layer's slots, tokens [rank, expert], and nodes."""
    experts, ranks = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    rows: list[list[int]] = [[] for _ in range(ranks)]
    for e in range(experts):
        for g in draw(st.sets(st.integers(0, ranks - 1), min_size=1)):
            rows[g].append(e)
    counts = draw(
        st.lists(
            st.lists(st.integers(0, 40), min_size=experts, max_size=experts), min_size=ranks, max_size=ranks
        )
    )
    nodes = draw(st.lists(st.integers(0, 2), min_size=ranks, max_size=ranks))
    return SlotTable(rows_to_slots(rows), experts), np.array(counts, dtype=np.int64), nodes


def policies(table: SlotTable) -> Iterator[SharePolicy]:
    yield EqualShares()
    yield BalancedShares()
    yield BalancedShares(speed_G=[1 + g for g in range(table.gpus)])
    slots = table.slots()[None]
    share = np.random.default_rng(0).random(slots.shape)
    yield PlannedShares(share, slots)


@given(layers())
@settings(max_examples=200)
def test_every_token_is_sent_once_and_near_tokens_stay(case: tuple[SlotTable, np.ndarray, list[int]]) -> None:
    table, counts, nodes = case
    load = counts.sum(axis=0)
    for policy in policies(table):
        quota = policy.quotas(0, load, table)
        assert (quota >= 0).all()
        sums = np.bincount(table.expert_P, weights=quota, minlength=table.experts)
        assert (sums == load).all(), policy.name
        sends = source_aware(counts, quota, table, nodes)
        assert (sends >= 0).all()
        assert (sends.sum(axis=0) == quota).all()
        for e in range(table.experts):
            assert (sends[:, table.expert_P == e].sum(axis=1) == counts[:, e]).all()
        # No choice with these quotas keeps more tokens on their GPU, or in their node.
        own = np.minimum(counts[table.rank_P, table.expert_P], quota)
        assert (sends[table.rank_P, np.arange(quota.size)] == own).all()
        node = np.array(nodes)
        for n, e in itertools.product(set(nodes), range(table.experts)):
            inside = (node[table.rank_P] == n) & (table.expert_P == e)
            kept = sends[np.ix_(node == n, inside)].sum()
            assert kept == min(counts[node == n, e].sum(), quota[inside].sum())


def best_makespan(table: SlotTable, load: np.ndarray) -> float:
    """Least possible largest load of a rank with divisible tokens: the densest set of ranks."""
    ranks = range(table.gpus)
    best = 0.0
    for k in range(1, table.gpus + 1):
        for group in itertools.combinations(ranks, k):
            trapped = [
                e
                for e in range(table.experts)
                if set(table.rank_P[table.expert_P == e].tolist()) <= set(group)
            ]
            best = max(best, load[trapped].sum() / k)
    return best


@given(layers())
@settings(max_examples=200)
def test_balanced_shares_come_close_to_the_best_possible(
    case: tuple[SlotTable, np.ndarray, list[int]],
) -> None:
    table, counts, _ = case
    load = 50 * counts.sum(axis=0)
    quota = BalancedShares(sweeps=50).quotas(0, load, table)
    largest = np.bincount(table.rank_P, weights=quota, minlength=table.gpus).max()
    bound = best_makespan(table, load)
    # Whole tokens cost up to one per replica; the sweeps stop when a round no longer helps.
    assert bound <= largest + 1e-9
    assert largest <= bound * 1.02 + table.expert_P.size


@given(
    st.integers(0, 200),
    st.lists(st.tuples(st.integers(0, 100), st.integers(1, 5)), min_size=1, max_size=6),
)
def test_pour_levels_the_vessels(tokens: int, vessels: list[tuple[int, int]]) -> None:
    busy, speed = [b for b, _ in vessels], [s for _, s in vessels]
    parts = pour(tokens, busy, speed)
    assert sum(parts) == tokens
    assert min(parts) >= 0
    # No whole token can move to another vessel and lower the higher of the two levels by more than one token.
    for i, j in itertools.permutations(range(len(vessels)), 2):
        if parts[i] > 1:
            high = (busy[i] + parts[i] - 1) / speed[i]
            low = (busy[j] + parts[j] + 1) / speed[j]
            assert low + 1e-9 >= high - 1 / speed[i]


@pytest.mark.parametrize(("tokens", "topk", "experts"), [(0, 2, 4), (5, 2, 4), (7, 3, 8), (3, 1, 2)])
def test_chosen_experts_are_ascending_on_both_paths(tokens: int, topk: int, experts: int) -> None:
    torch.manual_seed(0)
    wanted = torch.rand(tokens, experts).topk(topk, dim=1).indices.sort(dim=1).values
    routing_map = torch.zeros(tokens, experts, dtype=torch.bool).scatter(1, wanted, True)
    assert (chosen_experts(routing_map, topk) == wanted).all()
    if tokens:
        routing_map[0, wanted[0, 0]] = False  # one token with fewer experts: the general path
        got = chosen_experts(routing_map, topk)
        assert got[0].tolist() == [*wanted[0, 1:].tolist(), experts]
        assert (got[1:] == wanted[1:]).all()


def layer_of_linears(
    core: SlotDispatcher, weights: torch.Tensor, x: torch.Tensor, e: torch.Tensor, p: torch.Tensor
) -> torch.Tensor:
    rows, probs = core.prepare(x, e, p)
    rows, probs = core.send(rows, probs)
    rows, sizes, probs = core.sort_in(rows, probs)
    parts = torch.split(rows, sizes.tolist())
    done = [part @ weights[i] for i, part in zip(core.local_experts, parts, strict=True)]
    out = torch.cat(done) * probs[:, None]
    return core.combine(core.send_back(core.sort_out(out)))


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 0, 3, 1]])
@pytest.mark.parametrize("block", [1, 4])
def test_one_rank_computes_the_sum_over_experts(order: list[int], block: int) -> None:
    torch.manual_seed(0)
    group = ExpertGroup((0,), 0, torch.device("cpu"), 1.0)
    core = SlotDispatcher(0, 4, 3, SlotTable([order], 4), group, EqualShares(), row_block=block)
    weights = torch.randn(4, 6, 6, dtype=torch.float64)
    x = torch.randn(9, 6, dtype=torch.float64)
    experts = torch.rand(9, 4).topk(3, dim=1).indices.sort(dim=1).values
    probs = torch.rand(9, 3, dtype=torch.float64)
    want = sum(probs[:, [k]] * torch.einsum("th,tho->to", x, weights[experts[:, k]]) for k in range(3))
    assert torch.allclose(layer_of_linears(core, weights, x, experts, probs), want, atol=1e-12)
    core.valid, core.skip_invalid = torch.arange(9) < 5, True
    some = layer_of_linears(core, weights, x, experts, probs)
    assert torch.allclose(some[:5], want[:5], atol=1e-12)
    assert (some[5:] == 0).all()
    assert core.load_E is not None
    assert core.load_E.sum() == 3 * (9 + 5)
    core.valid = None
    empty = layer_of_linears(core, weights, x[:0], experts[:0], probs[:0])
    assert empty.shape == (0, 6)


def test_bad_use_is_refused() -> None:
    group = ExpertGroup((0,), 0, torch.device("cpu"), 1.0)
    core = SlotDispatcher(0, 2, 1, SlotTable([[0, 1]], 2), group, EqualShares())
    x = torch.ones(2, 3, requires_grad=True)
    with pytest.raises(UnsupportedFeatureError, match="no_grad"):
        core.prepare(x, torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1))
    core.valid = torch.ones(3, dtype=torch.bool)
    with pytest.raises(ProblemError, match="valid"):
        core.prepare(x.detach(), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1))
    with pytest.raises(ProblemError, match="2 ranks"):
        core.set_table(SlotTable(static_slots(2, 2), 2))
    with pytest.raises(ProblemError, match="speed_G"):
        BalancedShares(speed_G=[0, 1])


def some_shares() -> tuple[SlotTable, np.ndarray]:
    table = SlotTable([[0, 1, 2]] * 4, 3)
    return table, table.slots()[None]


@pytest.mark.parametrize(
    ("field", "make"),
    [
        ("sweeps", lambda: BalancedShares(sweeps=0)),
        ("sweeps", lambda: BalancedShares(sweeps=1.5)),  # type: ignore[arg-type]
        ("speed_G", lambda: BalancedShares(speed_G="ab")),  # type: ignore[arg-type]
        ("speed_G", lambda: BalancedShares(speed_G=[float("nan")])),  # type: ignore[list-item]
        ("speed_G", lambda: TimedShares(TimeModel(), speed_G=[0, 1])),
        ("speed_G", lambda: TimedShares(TimeModel(), speed_G=[[1, 1]])),
        ("per_token", lambda: TimedShares(TimeModel(), per_token=-1.0)),
        ("kicks", lambda: TimedShares(TimeModel(), kicks=-1)),
        ("time", lambda: TimedShares(None)),  # type: ignore[arg-type]
        ("share_LGC", lambda: PlannedShares(np.full((1, 4, 3), np.nan), some_shares()[1])),
        ("share_LGC", lambda: PlannedShares(np.ones((1, 4, 2)), some_shares()[1])),
        ("share_LGC", lambda: PlannedShares(np.ones((1, 4, 3)), some_shares()[1]).check(2, 4)),
        ("share_LGC", lambda: PlannedShares(np.ones((1, 4, 3)), some_shares()[1]).check(1, 3)),
    ],
)
def test_policies_that_say_nothing_of_use_are_refused(field: str, make: Callable[[], object]) -> None:
    with pytest.raises(ProblemError, match=rf"^{field}(\[\d\])*: "):
        make()


def test_speeds_of_other_ranks_are_refused() -> None:
    table, _ = some_shares()
    for speed_G in ([1, 2], [1, 2, 3, 4, 5]):
        for policy in (BalancedShares(speed_G), TimedShares(TimeModel(token_cost=1.0), speed_G=speed_G)):
            with pytest.raises(ProblemError, match=f"speed_G: has {len(speed_G)} entries for 4 ranks"):
                policy.quotas(0, np.array([100, 70, 30]), table)
            with pytest.raises(ProblemError, match="for 4 ranks"):
                policy.check(1, 4)
            policy.check(1, len(speed_G))


def test_policies_follow_their_ranks() -> None:
    table, slots_LGC = some_shares()
    three, load_E = SlotTable([[0, 1, 2]] * 3, 3), np.array([1000, 700, 300])
    balanced = BalancedShares([1, 2, 3, 4], sweeps=7)
    left = balanced.among([0, 2, 3])
    assert (left.speed_G, left.sweeps) == ([1, 3, 4], 7)
    assert left.among([0, None, 1, 2]).speed_G == [1, 3, 3, 4]
    assert BalancedShares().among([0]).speed_G is None
    timed = TimedShares(TimeModel(token_cost=1.0), per_token=0.5, speed_G=[1, 2, 3, 4], kicks=2)
    slower = timed.among([3, None])
    np.testing.assert_array_equal(slower.rates(SlotTable([[0], [1]], 2)), [4, 2.5])
    assert (slower.per_token, slower.kicks) == (0.5, 2)
    planned = PlannedShares(np.tile(np.array([0.1, 0.2, 0.3, 0.4])[:, None], (1, 1, 3)), slots_LGC)
    before = planned.quotas(0, load_E, table)
    after = planned.among([3, 0, None]).quotas(0, load_E, three).reshape(3, 3)
    np.testing.assert_array_equal(after, [load_E * 0.8, load_E * 0.2, load_E * 0])
    np.testing.assert_array_equal(planned.quotas(0, load_E, table), before)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("inner", "outer"), [(64, 160), (80, 64), (512, 256)])
def test_rows_do_not_depend_on_the_batch_in_the_default_blocks(
    inner: int, outer: int, dtype: torch.dtype, transposed: bool
) -> None:
    """What `row_block` rests on, for the BLAS of this machine."""
    block = default_row_block(torch.device("cpu"), [(inner, outer, dtype)], transposed=transposed)
    torch.manual_seed(0)
    weight, x = torch.randn(outer, inner, dtype=dtype), torch.randn(544, inner, dtype=dtype)
    # Every second row all but cancels: there the order of a sum shows in bf16, too.
    half = inner // 2
    weight[:, half:] = weight[:, :half]
    x[::2, half:] = -x[::2, :half]
    weight = weight.t().contiguous().t() if transposed else weight

    def product(rows: torch.Tensor) -> torch.Tensor:
        _, sizes = pieces([0], [len(rows)], block.most)
        return torch.cat([torch.nn.functional.linear(part, weight) for part in torch.split(rows, sizes)])

    full = product(x)
    step = block.rows
    for rows in (*range(step, 80, step), 128, 160, 192, 224, 256, 288, 512):
        for at in (0, 8, 544 - rows):
            assert torch.equal(product(x[at : at + rows]), full[at : at + rows]), (rows, at)


def test_pieces_are_batches_of_limited_rows() -> None:
    assert pieces("abcd", [5, 0, 4, 9], 4) == (["a", "a", "c", "d", "d", "d"], [4, 1, 4, 4, 4, 1])
    assert pieces("ab", [5, 0], None) == (["a"], [5])
    # What holds for one product and a multiple holds for both products of an expert.
    cpu, kinds = torch.device("cpu"), [(512, 256, torch.float64), (64, 160, torch.float64)]
    both, each = default_row_block(cpu, kinds), [default_row_block(cpu, [kind]) for kind in kinds]
    assert both.rows == max(b.rows for b in each)
    assert both.most == min(b.most for b in each if b.most is not None)


def test_a_checksum_sees_any_bit_and_knows_the_order() -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        weights = [torch.randn(33, 70).to(dtype), torch.randn(5).to(dtype)]
        right = checksum(weights)
        assert right == checksum([w.clone() for w in weights])
        for w in weights:
            bits = w.view(torch.uint8).view(-1)
            for at in (0, bits.numel() // 2, bits.numel() - 1):
                bits[at] ^= 4
                assert checksum(weights) != right
                bits[at] ^= 4
        swapped = weights[0].clone()
        swapped[[0, 1]] = swapped[[1, 0]]
        assert checksum([swapped, weights[1]]) != right
