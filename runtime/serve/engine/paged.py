"""A megatron-core model over a paged pool of keys and values: one flat row of tokens, one attention for all.

Every pass takes the tokens of all requests side by side, as one sequence ``[T, 1, H]``. Of the model only
three things change while a pass runs, and none of them is megatron's code: the rotary angles are those of
each token's own position, the core attention writes keys and values to the pool and reads those of the
token's own request, and the output layer sees only the rows whose next token is wanted. Everything else
(projections, norms, latent attention, router, experts) is the stock model, of any architecture that the
loader knows.

The attention is one product for all rows that ask for one token, and one for all pieces of prompts, each
padded to its longest row. There is no loop over requests.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moeless_opt.problems.arrays import BoolArray, IntArray
from moeless_opt.problems.errors import UnsupportedFeatureError
from moeless_opt.runtime.engines import LaunchRecorder
from moeless_opt.runtime.serve.engine.graphs import DecodeGraphs
from moeless_opt.runtime.serve.engine.lean import LeanDecoder

__all__ = ["KvPool", "PagedModel", "PassRows"]


@dataclass(frozen=True, slots=True, eq=False)
class PassRows:
    """What one forward pass computes on this rank, as arrays on the host.

    Parameters
    ----------
    tokens_T, position_T : int arrays, shape [T]
        Tokens, and their places in their requests; rows of one request stand together.
    slot_T : int array, shape [T]
        Where keys and values go: block times the block's length, plus the place in the block.
    begin_R, length_R : int arrays, shape [R]
        First row of each request's run, and its length; runs of one token stand in front.
    blocks_RB : int array, shape [R, B]
        Blocks of each request, padded with 0.
    wanted_S : int array, shape [S]
        Rows whose next token is wanted.
    """

    tokens_T: IntArray
    position_T: IntArray
    slot_T: IntArray
    begin_R: IntArray
    length_R: IntArray
    blocks_RB: IntArray
    wanted_S: IntArray


class KvPool:
    """Keys and values of all layers, in blocks of equally many tokens.

    Parameters
    ----------
    blocks, block_tokens : int
        How many blocks, and tokens in each. One more is kept for rows of no request.
    """

    def __init__(self, blocks: int, block_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        self.blocks, self.block_tokens = blocks, block_tokens
        self.dtype, self.device = dtype, device
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def spare_slot(self) -> int:
        """Where rows of no request write."""
        return self.blocks * self.block_tokens

    def of(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Tensors of a layer, [slots, heads, width]; made by its first pass, which knows the widths."""
        if layer not in self._layers:
            slots = (self.blocks + 1) * self.block_tokens
            self._layers[layer] = (
                torch.zeros((slots, *key.shape[1:]), dtype=self.dtype, device=self.device),
                torch.zeros((slots, *value.shape[1:]), dtype=self.dtype, device=self.device),
            )
        return self._layers[layer]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers that have run."""
        pairs = self._layers.values()
        each = sum(t[0].numel() * t.element_size() for pair in pairs for t in pair)
        return each * self.block_tokens


@dataclass(slots=True, eq=False)
class _Group:
    """Runs that attend together, padded to the longest.

    ``rows`` picks the rows of the pass (None: all from ``begin`` on, one each); ``back`` finds them again.
    ``blocks`` are those of the runs, one run after the other; ``mask`` is added to the scores.
    """

    rows: Tensor | None
    back: Tensor | None
    begin: int
    end: int
    runs: int
    blocks: Tensor
    mask: Tensor


class _Active:
    """The pass that runs: its rows as tensors, shared by all layers.

    Parameters
    ----------
    position, slot : int64 tensors, shape [T]
        Of the rows.
    wanted : int64 tensor, shape [S], or None
        Rows whose logits are wanted; None: all.
    groups : list of _Group
        Runs that attend together.
    """

    def __init__(self, position: Tensor, slot: Tensor, wanted: Tensor | None, groups: list[_Group]) -> None:
        self.position, self.slot, self.wanted, self.groups = position, slot, wanted, groups
        self.angles: dict[int, Tensor] = {}

    @classmethod
    def of(cls, rows: PassRows, pool: KvPool) -> _Active:
        """Any pass, from the host's arrays."""
        single = int((rows.length_R == 1).sum())
        groups = [
            cls._group(rows, pool, first, last)
            for first, last in ((0, single), (single, len(rows.length_R)))
            if last > first
        ]
        position, slot, wanted = (
            _tensor(array, pool.device) for array in (rows.position_T, rows.slot_T, rows.wanted_S)
        )
        return cls(position, slot, wanted, groups)

    @classmethod
    def single(cls, position_T: Tensor, slot_T: Tensor, block_TB: Tensor, pool: KvPool) -> _Active:
        """One token of each request, from tensors; nothing is asked of the host."""
        places = torch.arange(block_TB.size(1) * pool.block_tokens, device=pool.device)
        hidden = (places > position_T[:, None])[:, None, None]
        mask = torch.zeros(hidden.shape, dtype=pool.dtype, device=pool.device)
        group = _Group(
            rows=None,
            back=None,
            begin=0,
            end=len(position_T),
            runs=len(position_T),
            blocks=block_TB.reshape(-1),
            mask=mask.masked_fill_(hidden, -math.inf),
        )
        return cls(position_T, slot_T, None, [group])

    @staticmethod
    def _group(rows: PassRows, pool: KvPool, first: int, last: int) -> _Group:
        begin_R, length_R = rows.begin_R[first:last], rows.length_R[first:last]
        end_R = rows.position_T[begin_R + length_R - 1] + 1
        size = pool.block_tokens
        longest = math.ceil(int(end_R.max()) / size)
        place_K = np.arange(longest * size)
        widest = int(length_R.max())
        begin, end = int(begin_R[0]), int(begin_R[-1] + length_R[-1])
        where_RQ = begin_R[:, None] + np.minimum(np.arange(widest), length_R[:, None] - 1)
        hidden = (place_K > rows.position_T[where_RQ][:, :, None])[:, None]
        picked = back = None
        if widest > 1:
            picked = _tensor(where_RQ.ravel(), pool.device)
            real: BoolArray = np.arange(widest) < length_R[:, None]
            back = _tensor(np.flatnonzero(real), pool.device)
        return _Group(
            rows=picked,
            back=back,
            begin=begin,
            end=end,
            runs=last - first,
            blocks=_tensor(rows.blocks_RB[first:last, :longest].ravel(), pool.device),
            mask=torch.zeros(hidden.shape, dtype=pool.dtype, device=pool.device).masked_fill_(
                _tensor(hidden, pool.device), -math.inf
            ),
        )


def _tensor(array: Any, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)


class _PagedAttention(torch.nn.Module):
    """Stands for a layer's core attention while a pass is active."""

    def __init__(self, model: PagedModel, layer: int, stock: torch.nn.Module, scale: float | None) -> None:
        super().__init__()
        self.stock = stock
        self.layer, self.scale = layer, scale
        # Not a submodule: the model already holds this one.
        self.__dict__["owner"] = model

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Attend: tensors are [T, 1, heads, width]; returns [T, 1, heads x width]."""
        owner: PagedModel = self.__dict__["owner"]
        if owner.active is None:
            out: Tensor = self.stock(query, key, value, *args, **kwargs)
            return out
        return self.attend(query[:, 0], key[:, 0], value[:, 0])

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend in the pass that is active: tensors are [T, heads, width]."""
        owner: PagedModel = self.__dict__["owner"]
        active = owner.active
        assert active is not None
        keys, values = owner.pool.of(self.layer, k, v)
        keys.index_copy_(0, active.slot, k)
        values.index_copy_(0, active.slot, v)
        parts = [self._attend(q, keys, values, group) for group in active.groups]
        joined = parts[0] if len(parts) == 1 else torch.cat(parts)
        return joined.reshape(joined.size(0), 1, -1)

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, group: _Group) -> Tensor:
        k_RhKd, v_RhKd = (self._gathered(x, group) for x in (keys, values))
        rows = q[group.begin : group.end] if group.rows is None else q.index_select(0, group.rows)
        q_RhQd = rows.view(group.runs, -1, *q.shape[1:]).transpose(1, 2)
        out = F.scaled_dot_product_attention(
            q_RhQd,
            k_RhKd,
            v_RhKd,
            attn_mask=group.mask,
            scale=self.scale,
            enable_gqa=q_RhQd.size(1) != k_RhKd.size(1),
        )
        back = out.transpose(1, 2).flatten(0, 1)
        return back if group.back is None else back.index_select(0, group.back)

    def _gathered(self, pool: Tensor, group: _Group) -> Tensor:
        """Keys or values of each run, [R, heads, places, width]; whole blocks are copied."""
        size = self.__dict__["owner"].pool.block_tokens
        blocks = pool.view(-1, size * pool.size(1) * pool.size(2)).index_select(0, group.blocks)
        return blocks.view(group.runs, -1, *pool.shape[1:]).transpose(1, 2)


class _PlainLinear(torch.nn.Module):
    """Stands for a linear of megatron-core where there is no tensor parallelism: the product alone.

    The stock ones go through an autograd function and its preparations, which takes longer than a small
    product.
    """

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.weight, self.bias = stock.weight, stock.bias
        self.skips_bias = bool(getattr(stock, "skip_bias_add", False))
        self.__dict__["stock"] = stock

    def forward(
        self, x: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """As the stock ones: the product, and a bias that somebody else adds."""
        weight = self.weight if weight is None else weight
        if self.bias is None or self.skips_bias:
            return F.linear(x, weight), self.bias
        return F.linear(x, weight, self.bias), None


def _plain_linears(module: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str, torch.nn.Module]]:
    """Linears of a module, but not those of its routed experts: (parent, name, linear)."""
    for name, child in module.named_children():
        if type(child).__name__ in ("ColumnParallelLinear", "RowParallelLinear"):
            yield module, name, child
        elif name != "experts":
            yield from _plain_linears(child)


class _PagedRotary(torch.nn.Module):
    """Stands for a rotary embedding: while a pass is active, the angles of its rows' own positions."""

    def __init__(self, model: PagedModel, stock: Any) -> None:
        super().__init__()
        self.stock = stock
        self.__dict__["owner"] = model

    def get_rotary_seq_len(self, *args: Any, **kwargs: Any) -> int:
        """As the stock one has it."""
        length: int = self.stock.get_rotary_seq_len(*args, **kwargs)
        return length

    def forward(self, length: int, *args: Any, **kwargs: Any) -> Tensor:
        """Angles, [rows, 1, 1, width]."""
        owner: PagedModel = self.__dict__["owner"]
        active = owner.active
        if active is None:
            out: Tensor = self.stock(length, *args, **kwargs)
            return out
        found = active.angles.get(id(self.stock))
        if found is None:
            found = owner.angles(self.stock).index_select(0, active.position)
            active.angles[id(self.stock)] = found
        return found


class PagedModel:
    """A megatron-core model that computes passes of rows over a pool.

    Parameters
    ----------
    model : GPTModel
        In evaluation mode, attached or not. Called as before it computes as before.
    pool : KvPool
        Its keys and values.
    context_length : int
        Longest request.

    Raises
    ------
    UnsupportedFeatureError
        If its parts are not those that the loader builds.
    """

    def __init__(self, model: Any, pool: KvPool, context_length: int) -> None:
        self.model, self.pool, self.context_length = model, pool, context_length
        self.active: _Active | None = None
        self._angles: dict[int, Tensor] = {}
        self._turn: Tensor | None = None
        if not hasattr(model, "decoder") or not hasattr(model, "output_layer"):
            raise UnsupportedFeatureError(f"{type(model).__name__} is no megatron-core GPTModel")
        for number, layer in enumerate(model.decoder.layers):
            attention = layer.self_attention
            stock = attention.core_attention
            if not hasattr(stock, "softmax_scale"):
                raise UnsupportedFeatureError(f"core attention {type(stock).__name__} is not known here")
            attention.core_attention = _PagedAttention(self, number, stock, stock.softmax_scale)
            if model.config.multi_latent_attention:
                attention.rotary_pos_emb = _PagedRotary(self, attention.rotary_pos_emb)
        if not model.config.multi_latent_attention:
            model.rotary_pos_emb = _PagedRotary(self, model.rotary_pos_emb)
        self._linears = []
        if model.config.tensor_model_parallel_size == 1:
            self._linears = list(_plain_linears(model.decoder))
        for parent, name, stock in self._linears:
            setattr(parent, name, _PlainLinear(stock))
        self._lean = LeanDecoder(model) if LeanDecoder.fits(model) else None
        self.graphs: DecodeGraphs | None = None
        self._hook = model.output_layer.register_forward_pre_hook(self._wanted_rows)

    def record(self, recorder: LaunchRecorder) -> None:
        """Record decode passes from now on, where the model allows it; see `DecodeGraphs`."""
        if self._lean is not None:
            self.graphs = DecodeGraphs(self._lean, self._single, recorder, self.pool.device)

    def _wanted_rows(self, _module: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.active is None or self.active.wanted is None:
            return None
        return (args[0].index_select(0, self.active.wanted), *args[1:])

    def angles(self, rotary: Any) -> Tensor:
        """Angles of all positions, [context, 1, 1, width]."""
        if id(rotary) not in self._angles:
            self._angles[id(rotary)] = rotary(self.context_length)
        return self._angles[id(rotary)]

    def _turns(self, rotary: Any, dtype: torch.dtype) -> Tensor:
        """Cosines and sines of all positions, [context, 2, width]."""
        if self._turn is None or self._turn.dtype != dtype:
            angles = self.angles(rotary)[:, 0, 0]
            self._turn = torch.stack((angles.cos(), angles.sin()), dim=1).to(dtype)
        return self._turn

    @torch.no_grad()
    def forward(self, rows: PassRows) -> Tensor:
        """Compute a pass.

        Returns
        -------
        tensor, shape [S, V]
            Logits of the wanted rows.
        """
        if self.graphs is not None:
            pool = self.pool
            logits = self.graphs.forward(rows, pool.block_tokens, (pool.blocks, pool.spare_slot))
            if logits is not None:
                return logits
        return self._pass(_tensor(rows.tokens_T, self.pool.device), _Active.of(rows, self.pool))

    def _single(self, inputs: Tensor, rows: int, blocks: int) -> Tensor:
        """Logits of one token of each request; see `DecodeGraphs`."""
        tokens_T, position_T, slot_T = inputs[: 3 * rows].view(3, rows)
        block_TB = inputs[3 * rows : -1].view(rows, blocks)
        return self._pass(tokens_T, _Active.single(position_T, slot_T, block_TB, self.pool))

    def _pass(self, tokens_T: Tensor, active: _Active) -> Tensor:
        self.active = active
        try:
            if self._lean is not None:
                self.model.decoder.forward = self._decode
            logits: Tensor = self.model(tokens_T[None], active.position[None], None)
            return logits[0]
        finally:
            self.active = None
            self.model.decoder.__dict__.pop("forward", None)

    def _decode(self, hidden_states: Tensor, rotary_pos_emb: Tensor | None = None, **_: Any) -> Tensor:
        """In the place of the decoder's own forward, while a pass is active."""
        assert self._lean is not None
        turn = None
        if rotary_pos_emb is not None:
            assert self.active is not None
            table = self._turns(self.model.rotary_pos_emb.stock, hidden_states.dtype)
            cos, sin = table.index_select(0, self.active.position).unbind(1)
            turn = cos[:, None], sin[:, None]
        return self._lean.forward(hidden_states, rotary_pos_emb, turn)

    def idle_rows(self) -> PassRows:
        """One row of no request: what a rank without work computes."""
        zero, one = np.zeros(1, dtype=np.int64), np.ones(1, dtype=np.int64)
        slot = np.array([self.pool.spare_slot])
        return PassRows(zero, zero, slot, zero, one, np.array([[self.pool.blocks]]), zero[:0])

    def restore(self) -> None:
        """Give the model its own parts again."""
        self._hook.remove()
        for parent, name, stock in self._linears:
            setattr(parent, name, stock)
        for layer in self.model.decoder.layers:
            attention = layer.self_attention
            attention.core_attention = attention.core_attention.stock
            if self.model.config.multi_latent_attention:
                attention.rotary_pos_emb = attention.rotary_pos_emb.stock
        if not self.model.config.multi_latent_attention:
            self.model.rotary_pos_emb = self.model.rotary_pos_emb.stock
