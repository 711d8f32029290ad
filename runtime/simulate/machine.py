"""How long a simulated layer takes: all-to-all, experts, all-to-all, with a barrier after each.

Everything here is a model. What it rests on is said in `Machine.text`, which the simulator prints.

*All-to-all*: tokens start evenly on all GPUs; a GPU receives, for every token-expert pair that it serves, one
hidden state from each other GPU's share, over the link of their nodes, and sends its own share of all pairs;
ports of the node and of the network work side by side; the phase ends with the slowest port. Combine is
dispatch backwards and takes as long.

*Experts*: the problem's `TimeModel` of tokens and activated replicas, where experts run one after the other
corrected for uneven tokens; the phase ends with the slowest GPU.

*The rest of a pass* (attention, shared experts, norms): the larger of its arithmetic and of reading its
weights and the KV cache, on data-parallel GPUs. It is the same for every policy.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path

import numpy as np

from moeless_opt.problems.arrays import BoolArray, FloatArray, IntArray, Record, SlotArray, number
from moeless_opt.problems.errors import FormatError, ProblemError
from moeless_opt.problems.files import read_text
from moeless_opt.problems.io import load_time_models
from moeless_opt.problems.plan import activated, gpu_tokens, served_tokens
from moeless_opt.problems.spec import ModelSpec, TimeModel, Topology
from moeless_opt.runtime.simulate.hardware import BESIDE, GPUS, UNKNOWN, Beside
from moeless_opt.runtime.simulate.options import unknown

__all__ = ["LayerTimes", "Machine", "expert_curve"]

EFFICIENCY = (0.6, 0.75)
"""Assumed shares of the two peaks that kernels attain, where nothing was measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerTimes:
    """Times of a layer in each pass.

    Parameters
    ----------
    network_BL, experts_BL, split_BL : arrays, shape [B, L]
        Seconds of both all-to-all phases together, of the expert phase, and of sharing out tokens before it.
    mean_BL : array, shape [B, L]
        Mean over the GPUs of the expert phase: what perfect balance of the same work would take.
    tokens_BLG : array, shape [B, L, G]
        Token-expert pairs that each GPU served.
    seconds_BLG : array, shape [B, L, G]
        Expert time of each GPU.
    activated_BLG : array, shape [B, L, G]
        Replicas of each GPU that served a token.
    used_BL : array, shape [B, L]
        Replicas that served a token.
    """

    network_BL: FloatArray
    experts_BL: FloatArray
    split_BL: FloatArray
    mean_BL: FloatArray
    tokens_BLG: FloatArray
    seconds_BLG: FloatArray
    activated_BLG: FloatArray
    used_BL: FloatArray

    @property
    def layer_BL(self) -> FloatArray:
        """Seconds of the whole MoE layer, shape [B, L]."""
        return np.asarray(self.network_BL + self.experts_BL + self.split_BL)

    @classmethod
    def joined(cls, parts: Sequence[LayerTimes]) -> LayerTimes:
        """Passes one after the other."""
        names = [part.name for part in fields(cls)]
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})

    def first(self, count: int) -> LayerTimes:
        """Those of the first passes."""
        return LayerTimes(**{part.name: getattr(self, part.name)[:count] for part in fields(self)})


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Machine(Record):
    """GPUs and model as the simulator times them.

    Parameters
    ----------
    topology : Topology
        GPUs and links.
    model : ModelSpec
        Dimensions.
    time : TimeModel
        Expert time in seconds.
    in_turn : bool
        Whether experts of a GPU run one after the other, each for its own tokens: a measured curve, whose
        tokens are spread evenly, is corrected by what each takes alone. Else they are as if spread evenly.
    flops, bandwidth : float
        FLOP/s and bytes/s that a GPU attains outside the experts.
    kv_bytes : float
        Bytes of the KV cache of one token in one layer: keys and values of 8 heads of 128, 16 bits.
    once : float
        Bytes of embeddings and dense layers, which the GPUs share evenly (assumed).
    gpu : str
        What the GPUs are.
    basis : str
        Where `time`, `flops` and `bandwidth` come from, for people.
    """

    topology: Topology
    model: ModelSpec
    time: TimeModel
    flops: float
    bandwidth: float
    in_turn: bool = False
    kv_bytes: float = 4096.0
    once: float = 0.0
    gpu: str = "A6000"
    basis: str = ""

    def __post_init__(self) -> None:
        number("machine.flops", self.flops, open_low=True)
        number("machine.bandwidth", self.bandwidth, open_low=True)
        number("machine.kv_bytes", self.kv_bytes)

    @classmethod
    def of(
        cls,
        topology: Topology,
        model: ModelSpec,
        *,
        gpu: str = "A6000",
        timings: str | PathLike[str] | None = None,
        timed: tuple[int, int] | None = None,
        beside: Beside | None = None,
        in_turn: bool = False,
    ) -> Machine:
        """A machine from its data sheet, or from measured times of one expert on it.

        Parameters
        ----------
        topology, model : Topology, ModelSpec
            What runs where.
        gpu : str
            A name of ``GPUS``.
        timings : path, optional
            Measured kernel times of an expert (see `expert_curve`) on this GPU; or JSON, as
            `runtime.gpu_check` writes it: times of this model's experts together.
        timed : (int, int)
            Hidden and inner width of the expert that was measured; by default the model's own.
        beside : Beside, optional
            What the model holds beside its experts; by default what is known of its name.
        in_turn : bool
            Whether measured times are read for each expert with its own tokens.

        Raises
        ------
        ProblemError
            If there is no data sheet of that name.
        """
        if gpu not in GPUS:
            raise unknown("gpu", gpu, GPUS)
        peak_flops, peak_bandwidth = GPUS[gpu].flops, GPUS[gpu].bandwidth
        together = timings is not None and is_json(timings)
        for name, given in (("timed", timed is not None), ("in_turn", in_turn)):
            if together and given:
                why = "is for tables of one expert's kernels; this file has times of experts together"
                raise ProblemError(name, f"{why} ({Path(timings or '').name})")
        timed = timed or (model.hidden, model.ffn)
        beside = beside or BESIDE.get(model.name.partition(" (")[0], UNKNOWN)
        flops, bandwidth = peak_flops * EFFICIENCY[0], peak_bandwidth * EFFICIENCY[1]
        if timings is None:
            time = TimeModel.roofline(model, flops=flops, bandwidth=bandwidth)
            basis = (
                f"assumed: {EFFICIENCY[0]:.0%} of an {gpu}'s {peak_flops / 1e12:.4g} TFLOP/s and "
                f"{EFFICIENCY[1]:.0%} of its {peak_bandwidth / 1e9:.4g} GB/s; expert time = reading its "
                "weights + arithmetic"
            )
        elif together:
            time = together_curve(timings, model, gpu)
            basis = (
                f"expert time measured ({Path(timings).name}: {time.name}); the rest assumed: "
                f"{EFFICIENCY[0]:.0%} and {EFFICIENCY[1]:.0%} of an {gpu}'s peaks"
            )
        else:
            time = expert_curve(timings, model, timed=timed, most=8 * topology.gpus)
            basis = (
                f"expert time measured ({Path(timings).name}, an expert of {timed[0]} x {timed[1]}), scaled "
                f"by size to {model.hidden} x {model.ffn}; experts of a GPU one after the other, "
                f"{'each for its own tokens' if in_turn else 'tokens spread evenly over them'} (assumed); "
                f"the rest assumed: {EFFICIENCY[0]:.0%} and {EFFICIENCY[1]:.0%} of an {gpu}'s peaks"
            )
        return cls(
            topology=topology,
            model=model,
            time=time,
            flops=flops,
            bandwidth=bandwidth,
            in_turn=in_turn,
            kv_bytes=beside.kv_bytes,
            once=2.0 * beside.once,
            gpu=gpu,
            basis=basis,
        )

    def believed(self, kind: str) -> TimeModel:
        """Expert times as somebody has them who does not know the true ones (see `settings.BELIEVED`)."""
        if kind == "datasheet":
            sheet = GPUS[self.gpu]
            return TimeModel.roofline(self.model, flops=sheet.flops, bandwidth=sheet.bandwidth)
        if kind == "exact":
            return self.time
        fit = self.time.linear(1e5)  # as of a profile: tokens too dear, experts too cheap
        return fit.replace(token_cost=1.1 * fit.token_cost, activation_cost=0.9 * fit.activation_cost)

    @property
    def layer_bytes(self) -> float:
        """Bytes of one layer's weights outside the routed experts, on one GPU.

        Attention with grouped queries (2.5 hidden^2 weights, assumed) and the shared experts.
        """
        model = self.model
        shared = model.shared_experts * model.matrices * model.hidden * model.ffn
        return 2.0 * (2.5 * model.hidden**2 + shared)

    @property
    def other_bytes(self) -> float:
        """Bytes of all weights outside the routed experts, over all GPUs: a copy of the layers' on each."""
        return self.layer_bytes * self.model.layers * self.topology.gpus + self.once

    @property
    def kv_token_bytes(self) -> float:
        """Bytes of one token's keys and values in all layers."""
        return self.kv_bytes * self.model.layers

    @property
    def text(self) -> str:
        """What the times rest on."""
        links = self.topology.links
        return (
            f"{self.topology.gpus} GPUs, {links.intra_node / 1e9:.4g} GB/s in the node, "
            f"{links.inter_node / 1e9:.4g} between nodes, {links.host / 1e9:.4g} from the host (data sheet); "
            f"{self.basis}; all-to-all and attention modelled, no overlap of the two with experts (assumed)"
        )

    def layers(self, load_BLE: FloatArray, slots_LGC: SlotArray, share_BLGC: FloatArray) -> LayerTimes:
        """Times of every layer of some passes under one placement.

        Parameters
        ----------
        load_BLE : array, shape [B, L, E]
            Token-expert pairs.
        slots_LGC : array of int32, shape [L, G, C]
            Placement.
        share_BLGC : array, shape [B, L, G, C]
            Shares of each pass.
        """
        passes, layers, experts = load_BLE.shape
        flat = load_BLE.reshape(passes * layers, experts)
        slots = np.broadcast_to(slots_LGC, (passes, *slots_LGC.shape)).reshape(-1, *slots_LGC.shape[1:])
        shares = share_BLGC.reshape(slots.shape)
        tokens = gpu_tokens(flat, slots, shares)
        used = activated(flat, slots, shares)
        seconds = self.time.time(tokens, used, self.topology.speed_G)
        if self.in_turn and self.time.has_curve:
            seconds = seconds + self._uneven(served_tokens(flat, slots, shares), used)
        # A GPU that serves nothing launches nothing; a measured curve cannot say so below its first point.
        seconds = np.where(tokens > 0, seconds, 0.0)
        shape = (passes, layers, slots.shape[1])
        return LayerTimes(
            network_BL=self.all_to_all(tokens).reshape(passes, layers),
            experts_BL=seconds.max(1).reshape(passes, layers),
            split_BL=np.zeros((passes, layers)),
            mean_BL=seconds.mean(1).reshape(passes, layers),
            tokens_BLG=tokens.reshape(shape),
            seconds_BLG=seconds.reshape(shape),
            activated_BLG=used.reshape(shape).astype(np.float64),
            used_BL=used.sum(1).reshape(passes, layers).astype(np.float64),
        )

    def _uneven(self, tokens_RGC: FloatArray, used_RG: IntArray) -> FloatArray:
        """Seconds that experts in turn take beyond what they would with as many tokens each, shape [R, G]."""
        own_RGC = np.zeros(tokens_RGC.shape)
        served = tokens_RGC > 0
        own_RGC[served] = self.time.time(tokens_RGC[served], 1.0, 1.0)
        even_RG = used_RG * self.time.time(tokens_RGC.sum(2) / np.maximum(used_RG, 1), 1.0, 1.0)
        return np.asarray((own_RGC.sum(2) - even_RG) / self.topology.speed_G)

    def all_to_all(self, tokens_BG: FloatArray) -> FloatArray:
        """Seconds of dispatch and combine together, for the pairs that each GPU serves, shape [B]."""
        topology, links = self.topology, self.topology.links
        state = 2.0 * self.model.hidden  # bytes of a hidden state
        peers_G = np.bincount(topology.node_G)[topology.node_G] - 1
        others_G = topology.gpus - 1 - peers_G
        sends_BG = np.broadcast_to(tokens_BG.sum(1, keepdims=True) / topology.gpus, tokens_BG.shape)
        busiest_BG = np.maximum(tokens_BG, sends_BG) * state / topology.gpus
        near_BG = busiest_BG * peers_G / links.intra_node
        far_BG = busiest_BG * others_G / links.inter_node
        phase_B = np.maximum(near_BG, far_BG).max(1)
        live_B = tokens_BG.sum(1) > 0
        return np.asarray(2.0 * np.where(live_B, phase_B + links.latency * (topology.gpus > 1), 0.0))

    @property
    def link_per_token(self) -> float:
        """Seconds that one more pair on the busiest GPU adds to both all-to-all phases together."""
        topology, links = self.topology, self.topology.links
        peers_G = np.bincount(topology.node_G)[topology.node_G] - 1
        others_G = topology.gpus - 1 - peers_G
        hops = np.maximum(peers_G / links.intra_node, others_G / links.inter_node)
        return float(2.0 * 2.0 * self.model.hidden / topology.gpus * hops.max())

    def rest(self, tokens_B: FloatArray, kv_tokens_B: FloatArray) -> FloatArray:
        """Seconds of a pass outside its MoE layers, all layers together, shape [B]."""
        gpus, layers = self.topology.gpus, self.model.layers
        arithmetic_B = tokens_B / gpus * self.layer_bytes / self.flops  # 2 FLOP per 2-byte weight
        reading_B = (self.layer_bytes + kv_tokens_B / gpus * self.kv_bytes) / self.bandwidth
        return np.asarray(layers * np.maximum(arithmetic_B, reading_B))

    def kv_bytes_of(self, kv_tokens_B: FloatArray) -> FloatArray:
        """Bytes of the KV cache over all layers and GPUs, shape [B]."""
        return np.asarray(kv_tokens_B * self.kv_bytes * self.model.layers)

    def load_seconds(self, cold: IntArray, warm: IntArray, bytes_L: IntArray) -> FloatArray:
        """Seconds until each layer's cold replicas are there, shape [L]: a GPU receives one after the other.

        Parameters as of `replica_seconds`.
        """
        layers, gpus = len(bytes_L), self.topology.gpus
        seconds = self.replica_seconds(cold, warm, bytes_L)
        total = np.bincount(cold // self.model.experts, weights=seconds, minlength=layers * gpus)
        return np.asarray(total.reshape(layers, gpus).max(1), dtype=np.float64)

    def replica_seconds(self, cold: IntArray, warm: IntArray, bytes_L: IntArray) -> FloatArray:
        """Seconds that each cold replica takes alone, shape [N].

        Each comes over the nearest link from a GPU that holds the expert, else from the host; senders are not
        limited (assumed).

        Parameters
        ----------
        cold, warm : arrays of int
            Keys of the replicas that are wanted and of those that are there, ascending (see
            `moeless_opt.problems.spec.placement.replica_keys`).
        bytes_L : array of int, shape [L]
            Bytes of a replica.
        """
        topology, links, experts = self.topology, self.topology.links, self.model.experts
        gpus = topology.gpus
        if not cold.size:
            return np.zeros(0)

        def kinds(key: IntArray, group_G: IntArray, groups: int) -> IntArray:
            """Expert of a layer on a group of GPUs, as one number."""
            cell, expert = np.divmod(key, experts)
            layer, gpu = np.divmod(cell, gpus)
            return np.asarray((layer * groups + group_G[gpu]) * experts + expert)

        wanted = np.unique(kinds(cold, np.zeros_like(topology.node_G), 1))
        some = np.isin(kinds(warm, np.zeros_like(topology.node_G), 1), wanted)
        source = warm[some]  # only experts that move matter

        def within(group_G: IntArray, groups: int) -> BoolArray:
            return np.isin(kinds(cold, group_G, groups), kinds(source, group_G, groups))

        anywhere = within(np.zeros_like(topology.node_G), 1)
        rate = np.where(anywhere, links.inter_node, links.host)
        rate = np.where(within(topology.node_G, topology.nodes), links.intra_node, rate)
        return np.asarray(links.latency + bytes_L[cold // experts // gpus] / rate, dtype=np.float64)


def is_json(path: str | PathLike[str]) -> bool:
    """Whether a file of measured times is one of `save_time_models`, by its name."""
    return str(path).lower().removesuffix(".gz").endswith(".json")


def together_curve(path: str | PathLike[str], model: ModelSpec, gpu: str) -> TimeModel:
    """Measured times of all experts of a GPU together, for this model, from what `runtime.gpu_check` writes.

    Raises
    ------
    FormatError
        If the file has none of this model, or several, or they are of another GPU than this one.
    """
    models = load_time_models(path)
    own, _, sizes = model.name.partition(" (sizes of ")
    plain = sizes.removesuffix(")") or own  # experts as large as another model's take its times
    found = [name for name in models if name.partition(",")[0].casefold() == plain.casefold()]
    if len(found) != 1:
        has = ", ".join(models) or "none"
        raise FormatError(str(path), f"has {len(found)} times of {plain}, must have one; it has {has}")
    if models[found[0]].unit != "s":
        raise FormatError(str(path), f"{found[0]} is in {models[found[0]].unit!r}, must be in seconds")
    device = found[0].partition(",")[2]
    named = next((known for known in sorted(GPUS, key=len, reverse=True) if known in device), gpu)
    if named != gpu:
        raise FormatError(str(path), f"has times of an {named}, the machine is of {gpu}s; say gpu {named}")
    return models[found[0]]


def expert_curve(
    path: str | PathLike[str], model: ModelSpec, *, timed: tuple[int, int], most: int = 64
) -> TimeModel:
    """Time model from measured kernel times of one expert.

    The file (.csv or .csv.gz) has columns ``layer_name`` (``expert.w1``, ``expert.w2``, ``expert.w3``),
    ``input`` (tokens) and ``latency(ns)``. A GPU that serves n tokens with a replicas takes a times the time
    of n / a tokens (the tokens spread evenly, one expert after the other: assumed), times the ratio of the
    experts' sizes. Noisy measurements are smoothed, over up to four tokens more or less, to a curve that does
    not fall.

    Raises
    ------
    FormatError
        If a column or a matrix is missing.
    """
    table: dict[int, dict[str, float]] = {}
    try:
        for row in csv.DictReader(read_text(path).splitlines()):
            if row["layer_name"].startswith("expert."):
                tokens, latency = int(row["input"]), float(row["latency(ns)"])
                if tokens < 1 or not 0 < latency < np.inf:
                    what = "must be a time above 0 of one token or more"
                    raise FormatError(str(path), f"has {latency:g} ns for {tokens} tokens, {what}")
                table.setdefault(tokens, {})[row["layer_name"]] = latency * 1e-9
    except FormatError:
        raise
    except (KeyError, ValueError, TypeError, OverflowError, csv.Error) as error:
        raise FormatError(str(path), f"is no table of expert times ({error!r})") from None
    full = {n: sum(times.values()) for n, times in table.items() if len(times) == model.matrices}
    if len(full) < 2:
        raise FormatError(
            str(path), f"has no two token counts with all {model.matrices} matrices of an expert"
        )
    tokens_K = np.array(sorted(full), dtype=np.float64)
    time_K = np.array([full[int(n)] for n in tokens_K])
    # Of a table of few counts the next ones say other things.
    near_K = zip(*(np.searchsorted(tokens_K, tokens_K + off) for off in (-4, 5)), strict=True)
    smooth_K = np.maximum.accumulate([np.median(time_K[low:high]) for low, high in near_K])
    ratio = model.hidden * model.ffn / (timed[0] * timed[1])
    grid_K = np.unique(np.geomspace(1, 8 * tokens_K[-1], 96).round())
    active_J = np.unique(np.r_[1:9, np.geomspace(9, max(most, 10), 12).round()]).astype(np.float64)
    each_KJ = np.maximum(grid_K[:, None] / active_J, 1.0)
    half = min(len(tokens_K) // 2, len(tokens_K) - 2)
    slope = (smooth_K[-1] - smooth_K[half]) / (tokens_K[-1] - tokens_K[half])
    beyond = np.maximum(each_KJ - tokens_K[-1], 0.0) * slope
    curve_KJ = ratio * active_J * (np.interp(each_KJ, tokens_K, smooth_K) + beyond)
    return TimeModel(
        curve_tokens=grid_K, curve_activated=active_J, curve_time=curve_KJ, unit="s", name=Path(path).name
    )
