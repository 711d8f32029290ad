"""The block pool and the scheduler, without a model: who holds what, who computes what."""

from __future__ import annotations

import random

import pytest

from moeless_opt.runtime.serve import Sampling, ServeRequest
from moeless_opt.runtime.serve.engine.blocks import BlockPool
from moeless_opt.runtime.serve.engine.scheduler import Scheduler


def request(name: str, prompt: list[int], most: int = 8) -> ServeRequest:
    return ServeRequest(id=name, prompt=tuple(prompt), sampling=Sampling(temperature=0, max_tokens=most))


def test_what_was_computed_is_found_again_and_shared() -> None:
    pool = BlockPool(8, 4)
    tokens = list(range(11))
    assert pool.match(tokens) == []
    mine = [pool.take(), pool.take(), pool.take()]
    pool.filled(mine, tokens, 0, 11)
    again = pool.match([*tokens[:8], 99, 98])
    assert again == mine[:2]  # two full blocks; the third is not full
    assert pool.match([0, 1, 2, 3, 9, 9, 9, 9, 9]) == mine[:1]
    pool.give(mine)
    pool.give(again)
    pool.give(mine[:1])
    assert pool.used == 0
    assert pool.free == 8
    assert pool.kept == 2


def test_one_token_is_always_left_to_be_computed() -> None:
    pool = BlockPool(4, 4)
    mine = [pool.take(), pool.take()]
    pool.filled(mine, list(range(8)), 0, 8)
    assert pool.match(list(range(8))) == mine[:1]


def test_kept_blocks_are_overwritten_when_there_are_no_others() -> None:
    pool = BlockPool(2, 2)
    mine = [pool.take(), pool.take()]
    pool.filled(mine, [1, 2, 3, 4], 0, 4)
    pool.give(mine)
    assert pool.take() == mine[1]  # the end of a chain goes first: its beginning is of use alone
    assert pool.match([1, 2, 3, 4, 5]) == mine[:1]
    assert pool.take() is None


def test_without_memory_nothing_is_found() -> None:
    pool = BlockPool(4, 2, remember=False)
    mine = [pool.take()]
    pool.filled(mine, [1, 2], 0, 2)
    assert pool.match([1, 2, 3]) == []
    pool.give(mine)
    assert pool.kept == 0


def play(scheduler: Scheduler, arrivals: dict[int, ServeRequest], rng: random.Random) -> dict[str, list[int]]:
    """Run turns with a model that says the sum of what it saw, read from the pool by slots."""
    memory: dict[int, int] = {}
    out: dict[str, list[int]] = {}
    step = 0
    while arrivals or scheduler.busy:
        for at in [a for a in arrivals if a <= step]:
            scheduler.add(arrivals.pop(at))
        step += 1
        assert step < 5000
        turn = scheduler.next()
        if turn is None:
            continue
        rows = turn.rows
        assert 0 < len(rows.tokens_T) <= scheduler.budget
        assert len(set(rows.slot_T.tolist())) == len(rows.slot_T)
        memory |= dict(zip(rows.slot_T.tolist(), rows.tokens_T.tolist(), strict=True))
        size = scheduler.pool.size
        sums = {}
        for run, (one, count) in enumerate(turn.runs):
            upto = one.computed + count
            slots = [int(rows.blocks_RB[run, p // size]) * size + p % size for p in range(upto)]
            seen = [memory[s] for s in slots]
            assert seen == one.tokens[:upto]
            sums[one.id] = sum(seen) % 97
        scheduler.done(turn)
        for one in turn.wanted:
            one.tokens.append(sums[one.id])
            if len(one.tokens) >= one.most:
                out[one.id] = one.tokens[one.given :]
                scheduler.end(one)
            elif rng.random() < 0.01:
                out[one.id] = one.tokens[one.given :]
                scheduler.end(one)  # cancelled
    return out


@pytest.mark.parametrize("seed", range(12))
def test_any_traffic_in_any_pool_gives_what_each_request_alone_gives(seed: int) -> None:
    rng = random.Random(seed)
    size, blocks = rng.choice([1, 2, 4, 16]), rng.choice([40, 64, 200])
    pool = BlockPool(blocks, size, remember=rng.random() < 0.7)
    scheduler = Scheduler(
        pool, budget=rng.choice([1, 3, 16, 64]), most_running=rng.choice([1, 3, 8, 64]), context_length=200
    )
    starts = [[rng.randrange(90) for _ in range(rng.randrange(1, 30))] for _ in range(3)]
    arrivals, wanted = {}, {}
    for number in range(25):
        prompt = rng.choice(starts) + [rng.randrange(90) for _ in range(rng.randrange(0, 12))]
        prompt = prompt[: scheduler.context_length - 1] or [1]
        most = rng.randrange(1, 12)
        arrivals[number * 2] = request(str(number), prompt, most)
        tokens = list(prompt)
        while len(tokens) < min(len(prompt) + most, scheduler.context_length):
            tokens.append(sum(tokens) % 97)
        wanted[str(number)] = tokens[len(prompt) :]
    found = play(scheduler, arrivals, rng)
    assert found.keys() == wanted.keys()
    for name, tokens in found.items():
        assert tokens == wanted[name][: len(tokens)]
    assert sum(found[n] == wanted[n] for n in found) > 15
    assert pool.used == 0
    assert scheduler.running == []


def test_a_long_prompt_is_computed_in_pieces_while_others_go_on() -> None:
    scheduler = Scheduler(BlockPool(64, 4), budget=8, most_running=4, context_length=200)
    scheduler.add(request("short", [1, 2]))
    turn = scheduler.next()
    assert turn is not None
    scheduler.done(turn)
    turn.wanted[0].tokens.append(3)
    scheduler.add(request("long", list(range(50))))
    pieces = []
    for _ in range(7):
        turn = scheduler.next()
        assert turn is not None
        pieces.append({one.id: count for one, count in turn.runs})
        scheduler.done(turn)
        for one in turn.wanted:
            one.tokens.append(7)
    assert all(piece.get("short") == 1 for piece in pieces[:6])
    assert [piece["long"] for piece in pieces] == [7] * 7
