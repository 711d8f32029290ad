"""Who computes what in the next pass of one rank: those that generate first, then prompts. No torch here.

A pass has a budget of tokens. Every request that generates takes one; what is left goes to prompts in order
of arrival, so a long one is computed in pieces while others go on. Into the batch comes next the client that
has the fewest requests in it, so nobody waits for all that another has sent before. A request holds only the
blocks that it has filled: where the pool runs out, the youngest gives its blocks back and is computed again
later.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

import numpy as np

from moeless_opt.runtime.serve import ServeRequest
from moeless_opt.runtime.serve.engine.blocks import BlockPool
from moeless_opt.runtime.serve.engine.paged import PassRows

__all__ = ["Scheduler", "Sequenced", "Turn"]


@dataclass(slots=True, eq=False)
class Sequenced:
    """A request on its rank.

    Attributes
    ----------
    tokens : list of int
        Prompt and what was generated.
    computed : int
        Tokens whose keys and values are in the pool.
    given : int
        Tokens of the prompt (with what was generated before it came to this rank).
    most : int
        Tokens at which it ends.
    again : bool
        Whether it was in the batch before.
    """

    request: ServeRequest
    tokens: list[int]
    given: int
    most: int
    computed: int = 0
    cached: int = 0
    again: bool = False
    blocks: list[int] = field(default_factory=list)

    @property
    def id(self) -> str:
        """Of the request."""
        return self.request.id


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """A pass: its rows, and what belongs to them.

    Parameters
    ----------
    rows : PassRows
        For `PagedModel.forward`.
    runs : list of (Sequenced, int)
        Requests in order of their rows, and how many of their tokens are computed.
    wanted : list of Sequenced
        Whose next token comes out, in order of the logits.
    """

    rows: PassRows
    runs: list[tuple[Sequenced, int]]
    wanted: list[Sequenced]


class Scheduler:
    """Requests of one rank.

    Parameters
    ----------
    pool : BlockPool
        Its blocks.
    budget : int
        Most tokens in a pass.
    most_running : int
        Most requests in the batch.
    context_length : int
        Longest request.
    """

    def __init__(self, pool: BlockPool, *, budget: int, most_running: int, context_length: int) -> None:
        self.pool, self.budget, self.most_running = pool, budget, most_running
        self.context_length = min(context_length, pool.blocks * pool.size)
        self.waiting: deque[Sequenced] = deque()
        self.running: list[Sequenced] = []
        self.preempted = 0

    @property
    def busy(self) -> bool:
        """Whether there is anything to compute."""
        return bool(self.waiting or self.running)

    def add(self, request: ServeRequest, prompt: int | None = None) -> Sequenced:
        """Take a request; `prompt` tells how many of its tokens are the client's, if not all."""
        length = len(request.prompt) if prompt is None else prompt
        wanted = request.sampling.max_tokens
        most = self.context_length if wanted is None else min(length + wanted, self.context_length)
        one = Sequenced(request, list(request.prompt), length, most)
        self.waiting.append(one)
        return one

    def end(self, one: Sequenced) -> None:
        """Take a request out, wherever it is."""
        if one in self.running:
            self.running.remove(one)
        else:
            self.waiting.remove(one)
        self._release(one)

    def next(self) -> Turn | None:
        """What to compute now; None where there is nothing."""
        self._admit()
        runs = self._decodes()
        runs += self._prompts(self.budget - len(runs))
        # A prompt's piece may have taken blocks from a request that stood in front of it.
        runs = [(one, count) for one, count in runs if one in self.running]
        return self._turn(runs) if runs else None

    def done(self, turn: Turn) -> None:
        """The pass was computed."""
        for one, count in turn.runs:
            before, one.computed = one.computed, one.computed + count
            self.pool.filled(one.blocks, one.tokens, before, one.computed)

    # -- choosing ----------------------------------------------------------------------------------

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.most_running:
            one = self._first()
            found = self.pool.match(one.tokens)
            needed = -(-(len(one.tokens) + 1) // self.pool.size) - len(found)
            # Room for the whole prompt, or for as much as there is if nothing else runs.
            if self.running and needed > self.pool.free:
                self.pool.give(found)
                return
            self.waiting.remove(one)
            one.blocks = found
            one.computed = len(found) * self.pool.size
            one.cached = max(one.cached, min(one.computed, one.given))
            self.running.append(one)

    def _first(self) -> Sequenced:
        """Who comes next: what was in the batch before, else a client's that has the fewest in it."""
        first = self.waiting[0]
        if first.again or all(one.request.client == first.request.client for one in self.waiting):
            return first
        inside = Counter(one.request.client for one in self.running)
        return min(self.waiting, key=lambda one: inside[one.request.client])

    def _decodes(self) -> list[tuple[Sequenced, int]]:
        """Requests that generate, one token each; where they are more than the budget, in turns."""
        ready = [one for one in self.running if one.computed == len(one.tokens) - 1]
        if len(ready) > self.budget:
            ready = ready[: self.budget]
            for one in ready:
                self.running.remove(one)
                self.running.append(one)
        return [(one, 1) for one in ready if one in self.running and self._room(one, 1)]

    def _prompts(self, budget: int) -> list[tuple[Sequenced, int]]:
        runs = []
        for one in list(self.running):
            left = len(one.tokens) - one.computed
            if budget <= 0:
                break
            if left == 1 or one not in self.running:
                continue
            count = min(left, budget)
            if self._room(one, count):
                runs.append((one, count))
                budget -= count
        return runs

    def _room(self, one: Sequenced, count: int) -> bool:
        """Whether there are blocks for a request's next tokens; younger ones give theirs up."""
        needed = -(-(one.computed + count) // self.pool.size)
        while len(one.blocks) < needed:
            block = self.pool.take()
            if block is not None:
                one.blocks.append(block)
                continue
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is one:
                return False
        return True

    def _preempt(self, one: Sequenced) -> None:
        self.running.remove(one)
        self._release(one)
        one.computed = 0
        one.again = True
        self.waiting.appendleft(one)
        self.preempted += 1

    def _release(self, one: Sequenced) -> None:
        self.pool.give(one.blocks)
        one.blocks = []

    def _turn(self, runs: list[tuple[Sequenced, int]]) -> Turn:
        runs.sort(key=lambda run: run[1] > 1)  # single tokens in front, else in order
        size = self.pool.size
        length_R = np.array([count for _, count in runs], dtype=np.int64)
        begin_R = np.cumsum(length_R) - length_R
        base_R = np.array([one.computed for one, _ in runs], dtype=np.int64)
        position_T = np.arange(int(length_R.sum())) + np.repeat(base_R - begin_R, length_R)
        most = max(len(one.blocks) for one, _ in runs)
        blocks_RB = np.zeros((len(runs), most), dtype=np.int64)
        for row, (one, _) in enumerate(runs):
            blocks_RB[row, : len(one.blocks)] = one.blocks
        run_T = np.repeat(np.arange(len(runs)), length_R)
        slot_T = blocks_RB[run_T, position_T // size] * size + position_T % size
        tokens = [t for one, count in runs for t in one.tokens[one.computed : one.computed + count]]
        ends = [one.computed + count == len(one.tokens) for one, count in runs]
        return Turn(
            PassRows(
                np.array(tokens, dtype=np.int64),
                position_T,
                slot_T,
                begin_R,
                length_R,
                blocks_RB,
                (begin_R + length_R - 1)[ends],
            ),
            runs,
            [one for (one, _), end in zip(runs, ends, strict=True) if end],
        )
