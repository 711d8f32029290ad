"""A problem: everything that a solver needs, checked once."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any

import numpy as np

from moeless_opt.problems.arrays import (
    BoolArray,
    FloatArray,
    IntArray,
    Record,
    floats,
    frozen,
    integers,
    whole,
)
from moeless_opt.problems.errors import InfeasibleError, ProblemError
from moeless_opt.problems.spec.architecture import ModelSpec
from moeless_opt.problems.spec.loads import Loads, span
from moeless_opt.problems.spec.nearest import source_parts
from moeless_opt.problems.spec.placement import Placement
from moeless_opt.problems.spec.time_model import TOKENS, TimeModel
from moeless_opt.problems.spec.topology import Topology
from moeless_opt.problems.spec.wishes import (
    FILLS,
    MOST_ENTRIES,
    SPLITS,
    Fill,
    Groups,
    Limits,
    Objective,
    Risk,
    Sizing,
    Split,
)
from moeless_opt.problems.text import bytes_text, html_facts, printable

__all__ = ["Known", "Problem"]

_OBJECTIVE = Objective()
_LIMITS = Limits()
_SLOTS = Sizing()
_MOST_SLOTS = 10**8  # to be filled with copies, over layers and GPUs
_MOST_BYTES = 10**15  # of one expert; sums over layers and replicas then fit 64 bits


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Known(Record):
    """What is known of a shipped instance's best plan: largest GPU times per layer, and where it comes from.

    Parameters
    ----------
    source : str
        Where the instance and its values come from.
    best_L : tuple of float
        Best known largest GPU time of each layer.
    bound_L : tuple of float
        Proven lower bound of each layer; equal to `best_L` where the optimum is proven.
    """

    source: str
    best_L: tuple[float, ...] = ()
    bound_L: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for key in ("best_L", "bound_L"):
            value_L = floats(f"known.{key}", getattr(self, key))
            if value_L.ndim != 1:
                raise ProblemError(f"known.{key}", f"has shape {value_L.shape}, must be one number per layer")
            object.__setattr__(self, key, tuple(value_L.tolist()))


_KINDS: tuple[tuple[str, tuple[type, ...]], ...] = (
    ("loads", (Loads,)),
    ("topology", (Topology,)),
    ("model", (ModelSpec, type(None))),
    ("sizing", (Sizing,)),
    ("current", (Placement, type(None))),
    ("time", (TimeModel,)),
    ("objective", (Objective,)),
    ("limits", (Limits,)),
    ("groups", (Groups, type(None))),
    ("known", (Known, type(None))),
)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Problem(Record):
    """Loads to be served on GPUs, the live placement, and what is wanted.

    Parameters
    ----------
    loads : Loads
        Tokens per expert.
    topology : Topology
        The GPUs.
    model : ModelSpec, optional
        Gives the bytes of an expert.
    expert_bytes_L : array of int, shape [L], optional
        Bytes of one replica in each layer; overrides the model's.
    split : Split or str
        Whether the token shares of an expert's replicas are free, even, or follow from where its tokens come
        from (see `Split`).
    fill : Fill or str
        Whether every slot of a plan must be full, and if so whether with second copies on a GPU.
    share_entries : int, optional
        Entries of an expert in the engine's dispatch table: shares are multiples of one in so many. Free by
        default; with a fractional split only.
    sizing : Sizing
        How many replicas there are to be.
    current : Placement, optional
        What is live now; only replicas that it lacks have to move.
    time : TimeModel
        Time of a GPU from its tokens and activated experts.
    objective, limits : Objective, Limits
        What is wanted and what is allowed.
    groups : Groups, optional
        Experts that are to be on one node.
    name : str
        For people.
    known : Known, optional
        For shipped instances.

    Raises
    ------
    ProblemError
        If the parts do not fit each other.
    """

    loads: Loads
    topology: Topology
    model: ModelSpec | None = None
    expert_bytes_L: IntArray | None = None
    split: str = Split.FRACTIONAL
    fill: str = Fill.NONE
    share_entries: int | None = None
    sizing: Sizing = _SLOTS
    current: Placement | None = None
    time: TimeModel = TOKENS
    objective: Objective = _OBJECTIVE
    limits: Limits = _LIMITS
    groups: Groups | None = None
    name: str = ""
    known: Known | None = None
    capacity_LG: IntArray = field(init=False, repr=False, compare=False)
    """Slots of each GPU in each layer, shape [L, G]."""
    spread_LE: IntArray = field(init=False, repr=False, compare=False)
    """Failure domains that each expert must reach, shape [L, E]."""

    def __post_init__(self) -> None:
        for key, kind in _KINDS:
            value = getattr(self, key)
            if not isinstance(value, kind):
                want = " or ".join("None" if k is type(None) else k.__name__ for k in kind)
                raise ProblemError(key, f"is {type(value).__name__}, must be {want}")
        if self.split not in SPLITS:
            raise ProblemError("split", f"is {self.split!r}, must be one of {SPLITS}")
        object.__setattr__(self, "split", Split(self.split))
        if self.fill not in FILLS:
            raise ProblemError("fill", f"is {self.fill!r}, must be 'none', 'distinct' or 'copies'")
        object.__setattr__(self, "fill", Fill(self.fill))
        if self.share_entries is not None:
            self._check_entries(self.share_entries)
        _, layers, experts = self.loads.shape
        if self.model is not None and self.model.experts != experts:
            raise ProblemError(
                "model",
                f"{self.model.name} has {self.model.experts} experts per layer, the loads have {experts}",
            )
        if self.expert_bytes_L is not None:
            size_L = integers("expert_bytes", self.expert_bytes_L, low=1, high=_MOST_BYTES)
            if size_L.ndim == 0:
                size_L = integers("expert_bytes", np.full(layers, int(size_L)), low=1)
            if size_L.shape != (layers,):
                raise ProblemError(
                    "expert_bytes", f"has shape {size_L.shape}, must be one number or ({layers},)"
                )
            object.__setattr__(self, "expert_bytes_L", size_L)
        for key in ("best_L", "bound_L"):
            told_L = () if self.known is None else getattr(self.known, key)
            if len(told_L) not in (0, layers):
                raise ProblemError(f"known.{key}", f"has {len(told_L)} numbers, there are {layers} layers")
        shared = self.sizing.policy == "memory"
        copies = self.fill == Fill.COPIES
        capacity_LG = self.topology.capacity_LG(self.bytes_L, experts, shared=shared, copies=copies)
        object.__setattr__(self, "capacity_LG", capacity_LG)
        self._check_fill()
        if self.current is not None:
            self._check_current(self.current)
        for key in ("pinned", "forbidden"):
            for i, pair in enumerate(getattr(self.limits, key)):
                self._check_pair(f"limits.{key}[{i}]", *pair)
        object.__setattr__(self, "spread_LE", frozen(self._spread_LE()))
        self._check_sources()
        if self.groups is not None and self.groups.group_E.size != experts:
            raise ProblemError(
                "groups.group", f"is for {self.groups.group_E.size} experts, the loads have {experts}"
            )
        if self.objective.risk == Risk.COVARIANCE and (self.time.has_curve or self.time.activation_cost > 0):
            raise ProblemError(
                "objective.risk",
                "is 'covariance' with a time model of more than tokens, must be another: it takes times that "
                "are linear in the loads",
            )
        missing = (("hops", self.loads.flow_LEE, "loads.flow"), ("groups", self.groups, "groups"))
        for priority, part, where in missing:
            if priority in self.objective.priorities and part is None:
                raise ProblemError(where, f"is missing: the priorities name {priority!r}")

    def _check_sources(self) -> None:
        """Loads by source fit the topology; those by GPU give those by node."""
        by_node, by_gpu = self.loads.load_TLNE, self.loads.load_TLGE
        if by_gpu is not None:
            if by_gpu.shape[2] != self.topology.gpus:
                raise ProblemError(
                    "loads.by_gpu", f"has {by_gpu.shape[2]} GPUs, the topology has {self.topology.gpus}"
                )
            node_G = self.topology.node_G
            folded = np.stack([by_gpu[:, :, node_G == n].sum(2) for n in range(self.topology.nodes)], axis=2)
            if by_node is None:
                object.__setattr__(self, "loads", self.loads.replace(load_TLNE=folded))
            elif by_node.shape != folded.shape or not np.allclose(by_node, folded, rtol=1e-9, atol=1e-9):
                raise ProblemError("loads.by_node", "is not what loads.by_gpu gives")
        elif by_node is not None and by_node.shape[2] != self.topology.nodes:
            raise ProblemError(
                "loads.by_node", f"has {by_node.shape[2]} nodes, the topology has {self.topology.nodes}"
            )

    def _check_fill(self) -> None:
        if self.fill == Fill.NONE:
            return
        if self.sizing.policy not in ("slots", "fill"):
            raise ProblemError(
                "fill",
                f"is {self.fill!r} beside the sizing {self.sizing.policy!r}, which leaves slots empty; "
                "must be 'none', or the sizing 'slots'",
            )
        if int(self.capacity_LG.sum()) > _MOST_SLOTS:
            raise ProblemError(
                "fill",
                f"is {self.fill!r} with {self.capacity_LG.sum()} slots, at most {_MOST_SLOTS} are filled",
            )

    def _check_entries(self, entries: int) -> None:
        if self.split != Split.FRACTIONAL:
            raise ProblemError(
                "share_entries",
                f"is {entries} with an {self.split} split, must be left out: its shares are given",
            )
        entries = whole("share_entries", entries, low=1, high=MOST_ENTRIES)
        object.__setattr__(self, "share_entries", entries)

    def _spread_LE(self) -> IntArray:
        """What `Limits.spread` and `Limits.spread_experts` ask of each expert, shape [L, E]."""
        spread, which = self.limits.spread, self.limits.spread_experts
        shape = self.layers, self.experts
        if isinstance(which, tuple):
            for i, (layer, expert) in enumerate(which):
                self._check_pair(f"limits.spread_experts[{i}]", layer, expert, 0)
        if spread == 1 or which is None:
            return np.broadcast_to(np.int64(spread), shape)
        spread_LE = np.ones(shape, dtype=np.int64)
        if isinstance(which, tuple):
            row = {layer: x for x, layer in enumerate(self.loads.layers)}
            for layer, expert in which:
                spread_LE[slice(None) if layer < 0 else row[layer], expert] = spread
        else:
            hottest = np.argsort(-self.load_LE, axis=1, kind="stable")[:, :which]
            np.put_along_axis(spread_LE, hottest, spread, axis=1)
        return spread_LE

    def _check_pair(self, where: str, layer: int, expert: int, gpu: int) -> None:
        if layer >= 0 and layer not in self.loads.layers:
            raise ProblemError(
                where, f"names layer {layer}, the loads are of the layers {span(self.loads.layers)}"
            )
        for what, value, end in (("expert", expert, self.experts), ("gpu", gpu, self.topology.gpus)):
            if value >= end:
                raise ProblemError(where, f"names {what} {value}, the last one is {end - 1}")

    def _check_current(self, current: Placement) -> None:
        _, layers, experts = self.loads.shape
        have = (*current.slots_LGC.shape[:2], current.experts)
        want = (layers, self.topology.gpus, experts)
        if have != want:
            raise ProblemError(
                "current",
                "is for {} layers, {} GPUs and {} experts; the problem has {}, {} and {}".format(
                    *have, *want
                ),
            )
        used_LG = current.used_LG
        if self.fill != Fill.COPIES and (used_LG > self.capacity_LG).any():
            used_LG = np.asarray(current.held_LGE.sum(2))  # second copies go
        over = used_LG - self.capacity_LG
        if (over > 0).any():
            layer, gpu = (int(i) for i in np.argwhere(over > 0)[0])
            raise ProblemError(
                f"current[{layer}][{gpu}]",
                f"holds {used_LG[layer, gpu]} replicas of layer {self.loads.layers[layer]}, "
                f"GPU {gpu} has room for {self.capacity_LG[layer, gpu]}",
            )

    @property
    def layers(self) -> int:
        """Number of layers planned, L."""
        return self.loads.shape[1]

    @property
    def experts(self) -> int:
        """Experts per layer, E."""
        return self.loads.shape[2]

    @property
    def usable_LG(self) -> BoolArray:
        """GPUs that can hold an expert of a layer, shape [L, G]; the others (dead ones) count nowhere."""
        return np.asarray(self.capacity_LG > 0)

    @property
    def load_LE(self) -> FloatArray:
        """Expected loads, shape [L, E]."""
        return self.loads.load_LE

    @property
    def bytes_L(self) -> IntArray:
        """Bytes of one replica in each layer, shape [L]; zeros where unknown."""
        if self.expert_bytes_L is not None:
            return self.expert_bytes_L
        return np.full(self.layers, 0 if self.model is None else self.model.expert_bytes, dtype=np.int64)

    def source_parts(self, scenario: int | None = None) -> FloatArray:
        """Part of every expert's tokens that comes from each node (see `source_parts`).

        Of the expected loads by default; shape [L, N, E], or [L, N, 1] where all experts are alike.
        """
        by_node = self.loads.load_LNE
        if scenario is not None and self.loads.load_TLNE is not None:
            by_node = self.loads.load_TLNE[scenario]
        return source_parts(self.topology.node_G, self.usable_LG, by_node)

    def pairs_LEG(self, key: str) -> BoolArray:
        """The pinned or forbidden (expert, GPU) pairs as a mask, shape [L, E, G]."""
        mask = np.zeros((self.layers, self.experts, self.topology.gpus), dtype=np.bool_)
        row = {layer: x for x, layer in enumerate(self.loads.layers)}
        for layer, expert, gpu in getattr(self.limits, key):
            mask[slice(None) if layer < 0 else row[layer], expert, gpu] = True
        return mask

    def check_feasible(self) -> None:
        """Raise if no placement can satisfy the caps.

        Raises
        ------
        InfeasibleError
            Naming the cap that binds and by how much.
        """
        limits = self.limits
        if limits.spread > 1:
            self._check_spread()
        need_L = np.maximum(self.spread_LE, limits.min_replicas).sum(1)
        need, every = int(need_L.max()), int(need_L.sum())
        room_L = self.capacity_LG.sum(1)
        if (room_L < need_L).any():
            tight = int((room_L - need_L).argmin())
            raise InfeasibleError(self._shortage(int(room_L[tight]), int(need_L[tight])))
        if self.sizing.policy == "memory" and self.topology.memory_G is not None:
            floor, have = int(need_L @ self.bytes_L), int(self.topology.memory_G.sum())
            if have < floor:
                raise InfeasibleError(
                    f"topology.memory: {need} replicas in each of {self.layers} layers are {floor} bytes, "
                    f"the GPUs have {have} in all: {floor - have} too few"
                )
        if limits.max_layer_replicas is not None and limits.max_layer_replicas < need:
            raise InfeasibleError(
                f"limits.max_layer_replicas: {limits.max_layer_replicas} replicas per layer are "
                f"{need - limits.max_layer_replicas} too few; {self.experts} experts need {need}"
            )
        if limits.max_total_replicas is not None and limits.max_total_replicas < every:
            raise InfeasibleError(
                f"limits.max_total_replicas: {limits.max_total_replicas} replicas are "
                f"{every - limits.max_total_replicas} too few; "
                f"{self.layers} layers of {self.experts} experts need {every}"
            )
        if limits.max_total_bytes is not None:
            floor = int(need_L @ self.bytes_L)
            if limits.max_total_bytes < floor:
                raise InfeasibleError(
                    f"limits.max_total_bytes: {limits.max_total_bytes} bytes are "
                    f"{floor - limits.max_total_bytes} too few"
                )

        if limits.pinned or limits.forbidden:
            self._check_pairs()
        if self.fill != Fill.NONE:
            self._check_full()

    def _check_full(self) -> None:
        """Raise where full slots are more than the caps allow, or than there are experts."""
        limits, slots_L, what = self.limits, self.capacity_LG.sum(1), f"fill: {self.fill!r} fills"
        given_G = self.topology.slots_G
        if self.fill == Fill.DISTINCT and given_G is not None:
            full_LG = self.topology.capacity_LG(self.bytes_L, self.experts, copies=True)
            if (full_LG > self.experts).any():
                row, gpu = np.argwhere(full_LG > self.experts)[0]
                raise InfeasibleError(
                    f"topology.slots: GPU {gpu} has {full_LG[row, gpu]} slots, there are {self.experts} "
                    f"experts: with fill 'distinct' {full_LG[row, gpu] - self.experts} stay empty "
                    "(second copies: fill 'copies')"
                )
        if limits.max_replicas is not None and int(slots_L.max()) > limits.max_replicas * self.experts:
            raise InfeasibleError(
                f"limits.max_replicas: {limits.max_replicas} of each of {self.experts} experts are "
                f"{limits.max_replicas * self.experts}, {what} {slots_L.max()} slots of a layer"
            )
        if limits.max_layer_replicas is not None and int(slots_L.max()) > limits.max_layer_replicas:
            raise InfeasibleError(
                f"limits.max_layer_replicas: is {limits.max_layer_replicas}, {what} {slots_L.max()} slots"
            )
        if limits.max_total_replicas is not None and int(slots_L.sum()) > limits.max_total_replicas:
            raise InfeasibleError(
                f"limits.max_total_replicas: is {limits.max_total_replicas}, {what} {slots_L.sum()} slots"
            )
        need = int(slots_L @ self.bytes_L)
        if limits.max_total_bytes is not None and need > limits.max_total_bytes:
            raise InfeasibleError(
                f"limits.max_total_bytes: is {limits.max_total_bytes}, {what} {need} bytes of slots"
            )

    def _check_spread(self) -> None:
        spread, most = self.limits.spread, self.limits.max_replicas
        domains = np.unique(self.topology.failure_domain_G[self.capacity_LG.max(0) > 0]).size
        if not (self.spread_LE > 1).any():
            return
        if spread > domains:
            raise InfeasibleError(
                f"limits.spread: {spread} failure domains are wanted, {domains} have room for experts"
            )
        if most is not None and spread > most:
            raise InfeasibleError(
                f"limits.spread: {spread} failure domains cannot be reached with max_replicas = {most}"
            )

    def _check_pairs(self) -> None:
        pinned_LEG, forbidden_LEG = self.pairs_LEG("pinned"), self.pairs_LEG("forbidden")
        both = np.argwhere(pinned_LEG & forbidden_LEG)
        if both.size:
            row, expert, gpu = both[0]
            raise InfeasibleError(
                f"limits.forbidden: expert {expert} is pinned to GPU {gpu} and forbidden there, "
                f"layer {self.loads.layers[row]}"
            )
        over = np.argwhere(pinned_LEG.sum(1) > self.capacity_LG)
        if over.size:
            row, gpu = over[0]
            room, want = self.capacity_LG[row, gpu], pinned_LEG[row, :, gpu].sum()
            raise InfeasibleError(
                f"limits.pinned: {want} experts are pinned to GPU {gpu} in layer {self.loads.layers[row]}, "
                f"it has room for {room}: {want - room} too many"
            )
        room_LG = self.capacity_LG if self.fill == Fill.COPIES else self.capacity_LG > 0
        allowed_LE = (~forbidden_LEG * room_LG[:, None, :]).sum(2)
        short = np.argwhere(allowed_LE < self.limits.min_replicas)
        if short.size:
            row, expert = short[0]
            raise InfeasibleError(
                f"limits.forbidden: in layer {self.loads.layers[row]}, expert {expert} may be on "
                f"{allowed_LE[row, expert]} GPUs; it needs {self.limits.min_replicas}"
            )

    def _shortage(self, room: int, need: int) -> str:
        topology, experts = self.topology, self.experts
        least = need // experts
        each = "one replica each" if least == 1 else f"{least} replicas each"
        if need % experts:
            each = f"{self.limits.min_replicas} and more replicas each"
        what = f"{experts} experts with {each} need {need} slots per layer"
        by_slots = None if topology.slots_G is None else int(np.minimum(topology.slots_G, experts).sum())
        if by_slots is not None and by_slots < need:
            return f"topology.slots: {what}, the GPUs have {by_slots}: {need - by_slots} too few"
        if topology.memory_G is not None and self.bytes_L.any():
            have, floor = int(topology.memory_G.sum()), need * int(self.bytes_L.sum())
            return (
                f"topology.memory: {what}, that is {bytes_text(floor, 5)} over {self.layers} layers; "
                f"the GPUs have {bytes_text(have, 5)} in all, room for {room} slots per layer "
                f"({need - room} too few)"
            )
        return f"topology.slots: {what}, the GPUs have room for {room}: {need - room} too few"

    def digest(self) -> str:
        """Hash of the loads, the GPUs and the rules (not of names), 16 hex digits."""
        sha = hashlib.sha256()
        _feed(sha, self)
        return sha.hexdigest()[:16]

    def __repr__(self) -> str:
        title = f"{printable(self.name)}: " if self.name else ""
        live = "" if self.current is None else ", from a live placement"
        table = "" if self.share_entries is None else f" of {self.share_entries} entries"
        full = "" if self.fill == Fill.NONE else f", every slot full ({self.fill})"
        return f"Problem({title}{self.loads!r} on {self.topology!r}, {self.split} split{table}{full}{live})"

    def _repr_html_(self) -> str:
        facts = [
            ("loads", repr(self.loads)),
            ("on", repr(self.topology)),
            ("split, sizing, fill", f"{self.split}, {self.sizing.policy}, {self.fill}"),
            ("one replica", bytes_text(int(self.bytes_L[0])) if self.bytes_L.any() else "of unknown size"),
            ("live", "nothing" if self.current is None else f"{int(self.current.used_LG.sum())} replicas"),
            ("digest", self.digest()),
        ]
        return html_facts(facts, f"Problem {self.name}")


_SINCE = {
    "cost_GG": None,
    "load_TLGE": None,
    "flow_LEE": None,
    "groups": None,
    "sigma": 1.0,
    "failure_rate": 0.01,
    "spread_experts": None,
}
"""Fields that problems had none of once, and their defaults: where those stand, the digest is what it was."""
_UNHASHED = {"name", "source", "known", "scenarios", "skipped", "notes", "capacity_LG", "spread_LE"}


@cache
def _hashed_fields(kind: Any) -> tuple[str, ...]:
    return tuple(f.name for f in fields(kind) if f.name not in _UNHASHED)


def _feed(sha: Any, value: object) -> None:
    if isinstance(value, np.ndarray):
        sha.update(f"{value.dtype.str}{value.shape}".encode())
        sha.update(np.ascontiguousarray(value).data)
    elif id(value) in _DEFAULT_TEXT:
        sha.update(_DEFAULT_TEXT[id(value)])
    elif isinstance(value, Record):
        text = bytearray()
        kind: Any = type(value)
        for name in _hashed_fields(kind):
            part = getattr(value, name)
            if _as_once(name, part):
                continue
            if isinstance(part, np.ndarray | Record):
                sha.update(text + name.encode())
                text.clear()
                _feed(sha, part)
            else:
                text += f"{name}={part!r};".encode()
        sha.update(text)


def _as_once(name: str, value: object) -> bool:
    """Whether a field says what every problem said before there was that field."""
    return name in _SINCE and not isinstance(value, np.ndarray | Record) and value == _SINCE[name]


def _text(record: Record) -> bytes:
    """What `_feed` feeds of a record without arrays."""
    kind: Any = type(record)
    names = (n for n in _hashed_fields(kind) if not _as_once(n, getattr(record, n)))
    parts = (f"{name}={getattr(record, name)!r};" for name in names)
    return "".join(parts).encode()


# Only a shortcut: the text depends on the content, not on which object it is.
_DEFAULT_TEXT = {id(record): _text(record) for record in (TOKENS, _OBJECTIVE, _LIMITS, _SLOTS)}
