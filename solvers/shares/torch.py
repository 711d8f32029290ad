"""Token shares on the GPU: the coordinate descent of `shares` in torch, without host synchronisation.

The tables of the placement are prepared once. A call then runs a fixed number of sweeps of gathers, sorts and
scatters of static shapes on whatever device the loads are on: nothing is read back, no tensor decides a
branch, no shape depends on data, so the call can be queued behind the router, or captured in a CUDA graph.
Experts of one colour share no GPU, so scatters never collide and results are deterministic.

Same steps as `shares.descend`, hence the same numbers up to the dtype's rounding.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moeless_opt.solvers.shares.graph import ReplicaGraph

__all__ = ["TorchShares"]


class TorchShares:
    """Batched water-filling on a fixed placement, for loads that live on a device.

    Parameters
    ----------
    slots_LGC : int array [layers, GPUs, slots] or ReplicaGraph
        Placement, -1 where empty.
    speed_G : float array [GPUs], optional
        Relative speeds; ones by default. Ignored with a graph.
    experts : int, optional
        Experts per layer; needed with an array.
    device, dtype : optional
        Where and in what precision to work.
    sweeps : int
        Sweeps per call. More is closer to the optimum; see `gap`.

    Examples
    --------
    >>> import numpy as np, torch
    >>> solver = TorchShares(np.array([[[0, 1], [1, 2]]]), experts=3)
    >>> share, time = solver(torch.tensor([[6.0, 4.0, 2.0]], dtype=torch.float64))
    >>> time.max().item()
    6.0
    """

    def __init__(
        self,
        slots_LGC: NDArray[Any] | ReplicaGraph,
        speed_G: NDArray[np.float64] | None = None,
        *,
        experts: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float64,
        sweeps: int = 16,
    ) -> None:
        if isinstance(slots_LGC, ReplicaGraph):
            graph = slots_LGC
        else:
            speed_G = np.ones(slots_LGC.shape[1]) if speed_G is None else speed_G
            graph = ReplicaGraph(slots_LGC, speed_G, int(slots_LGC.max()) + 1 if experts is None else experts)
        self.sweeps = sweeps
        self.shape = graph.shape
        self._dtype = dtype
        L, G, C = graph.shape

        def index(array: NDArray[Any]) -> torch.Tensor:
            return torch.as_tensor(np.ascontiguousarray(array), dtype=torch.int64, device=device)

        def number(array: NDArray[Any]) -> torch.Tensor:
            return torch.as_tensor(np.ascontiguousarray(array), dtype=dtype, device=device)

        # Far above any load, and sums of it stay finite in either precision.
        self._overfull = 1e30 if dtype == torch.float32 else 1e280
        self._speed_G = number(graph.speed_G)
        layer_L1 = np.arange(L)[:, None]
        cell_LXR = graph.gpu_LXR + layer_L1[..., None] * (G + 1)
        live_LXR = graph.gpu_LXR < G
        self._expert_LX = index(graph.expert_LX)
        self._slot_LXR = index(graph.slot_LXR)
        self._cell_LXR = index(cell_LXR)
        self._even_LXR = number(live_LXR / np.maximum(live_LXR.sum(axis=2, keepdims=True), 1))
        self._single = index(graph.single)
        self._single_load = index(graph.single_load)
        self._base_pad = number(np.zeros(L * (G + 1)))
        # Loads of experts with one replica, summed per GPU in slot order: a gather and a row sum, no atomics.
        fixed_LGC = np.full(L * G * C, L * graph.experts, dtype=np.int64)
        fixed_LGC[graph.single] = graph.single_load
        self._fixed_LGC = index(fixed_LGC.reshape(L, G, C))
        uniform = bool(np.all(graph.speed_G == 1.0))
        X = graph.width
        self._colours = []
        for colour in graph.colours:
            R = len(colour.cell_RLM)
            row_LM = layer_L1 * (X + 1) + colour.member_LM
            self._colours.append(
                (
                    index(row_LM),
                    index(colour.cell_RLM),
                    number(colour.speed_RLM),
                    number(
                        (colour.cell_RLM % (G + 1) < G)
                        / np.maximum((colour.cell_RLM % (G + 1) < G).sum(axis=0), 1)
                    ),
                    R == 2 and uniform,
                )
            )
        self._count_R = number(np.arange(1, graph.gpu_LXR.shape[2] + 1))[:, None, None] if X else None

    def __call__(self, load_LE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Shares and GPU times for the given loads.

        Parameters
        ----------
        load_LE : tensor [layers, experts]
            Tokens, on the solver's device.

        Returns
        -------
        share_LGC : tensor [layers, GPUs, slots]
            Fraction of its expert's tokens that each slot serves.
        time_LG : tensor [layers, GPUs]
            GPU times.
        """
        L, G, _ = self.shape
        load = load_LE.to(self._dtype)
        zero_L1 = torch.zeros((L, 1), dtype=load.dtype, device=load.device)
        padded_LE = torch.cat([load, zero_L1], dim=1)
        load_LX = torch.gather(padded_LE, 1, self._expert_LX)
        flat = torch.cat([load.reshape(-1), zero_L1[0]])
        base_LG = flat[self._fixed_LGC].sum(dim=2)
        work = torch.cat([base_LG, torch.full_like(zero_L1, self._overfull)], dim=1).reshape(-1)
        row_load = torch.cat([load_LX, zero_L1], dim=1).reshape(-1)
        tokens = []
        for row_LM, cell_RLM, _, even_RLM, _ in self._colours:
            token_RLM = row_load[row_LM] * even_RLM
            work[cell_RLM] = work[cell_RLM] + token_RLM
            tokens.append(token_RLM)
        loads = [row_load[row_LM] for row_LM, *_ in self._colours]
        for _ in range(self.sweeps):
            for k, (_, cell_RLM, speed_RLM, _, pair) in enumerate(self._colours):
                other_RLM = work[cell_RLM] - tokens[k]
                fill = _fill_pair if pair else _fill
                tokens[k] = fill(other_RLM, loads[k], speed_RLM)
                work[cell_RLM] = other_RLM + tokens[k]
        time_LG = work.reshape(L, G + 1)[:, :G] / self._speed_G
        return self._to_shares(load_LX, tokens), time_LG

    def _to_shares(self, load_LX: torch.Tensor, tokens: list[torch.Tensor]) -> torch.Tensor:
        L, G, C = self.shape
        X, R = self._even_LXR.shape[1:]
        share = torch.zeros(L * G * C + 1, dtype=load_LX.dtype, device=load_LX.device)
        share[self._single] = 1.0
        if X:
            token = torch.zeros((L * (X + 1), R), dtype=load_LX.dtype, device=load_LX.device)
            for (row_LM, *_), token_RLM in zip(self._colours, tokens, strict=True):
                token[row_LM, : len(token_RLM)] = token_RLM.permute(1, 2, 0)
            token_LXR = token.reshape(L, X + 1, R)[:, :X]
            total_LX1 = token_LXR.sum(dim=2, keepdim=True)
            used = total_LX1 > 0.0
            part = token_LXR / torch.where(used, total_LX1, torch.ones_like(total_LX1))
            share[self._slot_LXR] = torch.where(used, part, self._even_LXR)
        return share[:-1].reshape(L, G, C)

    def gap(self, load_LE: torch.Tensor, time_LG: torch.Tensor) -> torch.Tensor:
        """Proven relative gap of each layer, as a tensor: largest time over the best prefix density, less 1.

        As `shares.ReplicaGraph.bound`, on the device.
        """
        L, G, _ = self.shape
        load = load_LE.to(self._dtype)
        zero_L1 = torch.zeros((L, 1), dtype=load.dtype, device=load.device)
        flat = torch.cat([load.reshape(-1), zero_L1[0]])
        captive_LG = flat[self._fixed_LGC].sum(dim=2)
        order_LG = torch.argsort(time_LG, dim=1, descending=True, stable=True)
        captive_LG = torch.gather(captive_LG, 1, order_LG)
        if self._expert_LX.shape[1]:
            rank = torch.argsort(order_LG, dim=1, stable=True)
            rank = torch.cat([rank, torch.full_like(rank[:, :1], -1)], dim=1).reshape(-1)
            last_LX = rank[self._cell_LXR].amax(dim=2).clamp(min=0)
            load_LX = torch.gather(torch.cat([load, zero_L1], dim=1), 1, self._expert_LX)
            # Loads summed by rank through a comparison matrix: deterministic, unlike atomic adds.
            hit_LXG = last_LX[..., None] == torch.arange(G, device=load.device)
            captive_LG = captive_LG + torch.where(hit_LXG, load_LX[..., None], 0.0).sum(dim=1)
        bound_L = (captive_LG.cumsum(dim=1) / self._speed_G[order_LG].cumsum(dim=1)).amax(dim=1)
        top_L = time_LG.amax(dim=1)
        safe_L = torch.where(bound_L > 0.0, bound_L, torch.ones_like(bound_L))
        return torch.where(bound_L > 0.0, top_L / safe_L - 1.0, torch.zeros_like(top_L)).clamp(min=0.0)


def _fill_pair(other_RLM: torch.Tensor, load_LM: torch.Tensor, speed_RLM: torch.Tensor) -> torch.Tensor:
    low_LM = other_RLM.amin(dim=0)
    level_LM = torch.minimum(low_LM + load_LM, 0.5 * (other_RLM.sum(dim=0) + load_LM))
    return (level_LM - other_RLM).clamp(min=0.0)


def _fill(other_RLM: torch.Tensor, load_LM: torch.Tensor, speed_RLM: torch.Tensor) -> torch.Tensor:
    order_RLM = torch.argsort(other_RLM / speed_RLM, dim=0, stable=True)
    load_RLM = torch.gather(other_RLM, 0, order_RLM).cumsum(dim=0) + load_LM
    level_LM = (load_RLM / torch.gather(speed_RLM, 0, order_RLM).cumsum(dim=0)).amin(dim=0)
    return (level_LM * speed_RLM - other_RLM).clamp(min=0.0)
