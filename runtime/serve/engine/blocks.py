"""Blocks of the KV pool: who holds which, and which are kept for prompts that begin alike. No torch here."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

__all__ = ["BlockPool"]

#: What a full block holds: the chain of blocks before it (by number), and its tokens.
_Key = tuple[int, tuple[int, ...]]


class BlockPool:
    """Hands out blocks, counts who holds them, and remembers what full ones contain.

    A block that nobody holds any more but whose contents are known stays findable until its place is needed:
    those that were let go first are overwritten first.

    Parameters
    ----------
    blocks : int
        How many there are.
    size : int
        Tokens in each.
    remember : bool
        Whether contents are kept for later prompts.
    """

    def __init__(self, blocks: int, size: int, *, remember: bool = True) -> None:
        self.blocks, self.size, self.remember = blocks, size, remember
        self._free = list(range(blocks - 1, -1, -1))
        self._holders = [0] * blocks
        self._by_key: dict[_Key, int] = {}
        self._key_of: dict[int, _Key] = {}
        self._chain: dict[int, int] = {}  # number of the chain that ends in a block
        self._chains = 0
        self._kept: OrderedDict[int, None] = OrderedDict()

    @property
    def free(self) -> int:
        """Blocks that can be had, kept ones included."""
        return len(self._free) + len(self._kept)

    @property
    def kept(self) -> int:
        """Of these, blocks whose contents are remembered."""
        return len(self._kept)

    @property
    def used(self) -> int:
        """Blocks that requests hold."""
        return self.blocks - self.free

    def take(self) -> int | None:
        """One block, its old contents forgotten; None where all are held."""
        if self._free:
            block = self._free.pop()
        elif self._kept:
            block, _ = self._kept.popitem(last=False)
            self._forget(block)
        else:
            return None
        self._holders[block] = 1
        return block

    def give(self, blocks: Sequence[int]) -> None:
        """Let blocks go, in the order of a request; a chain is overwritten from its end."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if block in self._key_of:
                self._kept[block] = None
            else:
                self._chain.pop(block, None)
                self._free.append(block)

    def match(self, tokens: Sequence[int]) -> list[int]:
        """Hold the longest run of remembered blocks with which a prompt begins.

        At least one token is left to be computed: its successor is wanted.
        """
        found: list[int] = []
        if not self.remember:
            return found
        chain = 0
        for first in range(0, len(tokens) - self.size, self.size):
            block = self._by_key.get((chain, tuple(tokens[first : first + self.size])))
            if block is None:
                break
            found.append(block)
            chain = self._chain[block]
        for block in found:
            self._holders[block] += 1
            self._kept.pop(block, None)
        return found

    def filled(self, blocks: Sequence[int], tokens: Sequence[int], before: int, after: int) -> None:
        """Remember the blocks of a request that became full.

        Parameters
        ----------
        blocks, tokens : sequences of int
            Of the whole request.
        before, after : int
            Tokens whose keys and values are in the pool.
        """
        if not self.remember:
            return
        for place in range(before // self.size, after // self.size):
            block = blocks[place]
            if block in self._key_of:
                continue
            chain = self._chain.get(blocks[place - 1], -1) if place else 0
            if chain < 0:  # what stands before is not remembered under this request's own blocks
                return
            key = (chain, tuple(tokens[place * self.size : (place + 1) * self.size]))
            twin = self._by_key.get(key)
            if twin is not None:  # another request computed the same at the same time: go on behind it
                self._chain[block] = self._chain[twin]
                continue
            self._chains += 1
            self._by_key[key], self._key_of[block] = block, key
            self._chain[block] = self._chains

    def forget_all(self) -> None:
        """Nothing in the pool may be used again (what is held stays held)."""
        self._free.extend(self._kept)
        self._kept.clear()
        self._by_key.clear()
        self._key_of.clear()
        self._chain.clear()

    def _forget(self, block: int) -> None:
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._by_key[key]
        self._chain.pop(block, None)
