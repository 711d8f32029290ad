"""The traffic: tokens that the router sends to each expert of each layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from moeless_opt.problems.arrays import FloatArray, Record, floats, whole
from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.text import printable

__all__ = ["Loads", "span"]

_MOST = 1e30  # sums and products of such loads still are finite


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Loads(Record):
    """Loads of the experts in one forward pass or window, as one or several scenarios.

    Parameters
    ----------
    load_TLE : array of float, shape [T, L, E]
        Token-expert pairs (tokens x top-k) routed to each expert; finite and at least 0. All zeros are an
        idle window: what is live stays, and of plans one is as good as another.
    weight_T : array of float, shape [T], optional
        Weights of the scenarios; equal by default. They are scaled to sum to 1.
    layers : sequence of int, optional
        The model's own index of each layer, in rising order; 0, 1, ... by default.
    scenarios : sequence of str, optional
        Names of the scenarios.
    skipped : sequence of int, optional
        Layers of the recording that have no routed experts (dense layers).
    load_TLNE : array of float, shape [T, L, N, E], optional
        The same loads by source node; summed over the nodes they must give `load_TLE`.
    load_TLGE : array of float, shape [T, L, G, E], optional
        The same loads by source GPU, where that is known.
    flow_LEE : array of float, shape [L - 1, E, E], optional
        How often a token's expert in a layer (row) was followed by one in the next layer (column), between
        each layer and the next of these: what the affinity of layers is counted from.
    source : str
        Where the loads come from, for people.
    notes : sequence of str, optional
        What a reader did to the recording (summed, skipped, ...).

    Raises
    ------
    ProblemError
        If a field is malformed.
    """

    load_TLE: FloatArray
    weight_T: FloatArray | None = None
    layers: tuple[int, ...] = ()
    scenarios: tuple[str, ...] = ()
    skipped: tuple[int, ...] = ()
    load_TLNE: FloatArray | None = None
    load_TLGE: FloatArray | None = None
    flow_LEE: FloatArray | None = None
    source: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        put = object.__setattr__
        load_TLE = floats("loads", self.load_TLE)
        if load_TLE.ndim == 2:
            load_TLE = load_TLE[None]
        if load_TLE.ndim != 3:
            hint = "; for a single layer give loads[None, :]" if load_TLE.ndim == 1 else ""
            raise ProblemError(
                "loads",
                f"has shape {load_TLE.shape}, must be [layers, experts] or "
                f"[scenarios, layers, experts]{hint}",
            )
        if 0 in load_TLE.shape:
            raise ProblemError("loads", f"is empty: shape {load_TLE.shape}")
        most = float(load_TLE.max())
        if most > _MOST:
            raise ProblemError("loads", f"reach {most:g}, must be at most {_MOST:g}")
        put(self, "load_TLE", load_TLE)
        scenarios, layers, experts = load_TLE.shape
        if self.weight_T is not None:
            weight_T = floats("loads.weights", self.weight_T)
            if weight_T.shape != (scenarios,):
                raise ProblemError("loads.weights", f"has shape {weight_T.shape}, must be ({scenarios},)")
            if not weight_T.any():
                raise ProblemError("loads.weights", "are all zero; at least one must be above 0")
            # What sums to 1 stays as it is to the last bit, so that reading back changes nothing.
            total = float(weight_T.sum())
            put(
                self,
                "weight_T",
                weight_T if abs(total - 1) < 1e-12 else floats("loads.weights", weight_T / total),
            )
        put(self, "layers", _indices("loads.layers", self.layers) or tuple(range(layers)))
        if len(self.layers) != layers or any(
            a >= b for a, b in zip(self.layers, self.layers[1:], strict=False)
        ):
            raise ProblemError("loads.layers", f"must be {layers} rising numbers, one per layer")
        names: object = self.scenarios
        if isinstance(names, str) or not isinstance(names, Iterable):
            raise ProblemError("loads.scenarios", f"is {names!r}, must be a list of names")
        put(self, "scenarios", tuple(str(name) for name in names))
        if self.scenarios and len(self.scenarios) != scenarios:
            raise ProblemError(
                "loads.scenarios", f"names {len(self.scenarios)} scenarios, there are {scenarios}"
            )
        notes: object = self.notes
        if isinstance(notes, str) or not isinstance(notes, Iterable):
            raise ProblemError("loads.notes", f"is {notes!r}, must be a list of texts")
        put(self, "notes", tuple(notes))
        for i, note in enumerate(self.notes):
            if not isinstance(note, str):
                raise ProblemError(f"loads.notes[{i}]", f"is {note!r}, must be a text")
        put(self, "skipped", _indices("loads.skipped", self.skipped))
        for key, name, what in (("load_TLNE", "by_node", "nodes"), ("load_TLGE", "by_gpu", "GPUs")):
            if getattr(self, key) is not None:
                put(self, key, _by_source(getattr(self, key), load_TLE, name, what))
        if self.flow_LEE is not None:
            flow_LEE = floats("loads.flow", self.flow_LEE)
            want = (layers - 1, experts, experts)
            if flow_LEE.shape != want:
                raise ProblemError("loads.flow", f"has shape {flow_LEE.shape}, must be {list(want)}")
            if float(flow_LEE.max(initial=0.0)) > _MOST:
                raise ProblemError("loads.flow", f"reaches {flow_LEE.max():g}, must be at most {_MOST:g}")
            put(self, "flow_LEE", flow_LEE)

    @classmethod
    def together(
        cls, parts: Sequence[Loads], *, names: Sequence[str] = (), weights: Sequence[float] | None = None
    ) -> Loads:
        """Several workloads of one model as scenarios of one plan, such as prefill and decode.

        Every layer of each is scaled to the most tokens that it has in any of them: a recording counts no
        more for being longer. Scenarios of a part stay scenarios, and share its weight.

        Parameters
        ----------
        parts : sequence of Loads
            Of the same layers and experts.
        names : sequence of str, optional
            One for each part; their sources by default.
        weights : sequence of float, optional
            One for each part; equal by default.

        Raises
        ------
        ProblemError
            If the parts do not fit together.
        """
        if not parts:
            raise ProblemError("loads", "are of no workload, must be of at least one")
        names = tuple(names) or tuple(part.source or str(i) for i, part in enumerate(parts))
        weights = [1.0] * len(parts) if weights is None else list(weights)
        for what, given in (("scenarios", names), ("weights", weights)):
            if len(given) != len(parts):
                raise ProblemError(f"loads.{what}", f"are {len(given)}, there are {len(parts)} workloads")
        first = parts[0]
        for name, part in zip(names, parts, strict=True):
            if part.layers != first.layers or part.shape[2] != first.shape[2]:
                raise ProblemError(
                    name,
                    f"has layers {span(part.layers)} of {part.shape[2]} experts, {names[0]} has "
                    f"{span(first.layers)} of {first.shape[2]}: they are no workloads of one model",
                )
            if any(one is not None for one in (part.load_TLNE, part.load_TLGE, part.flow_LEE)):
                raise ProblemError(
                    name, "has loads by source or a flow between layers, which is for one workload alone"
                )
        total_PTL = [part.load_TLE.sum(2) for part in parts]
        most_L = np.concatenate(total_PTL).max(0)
        load_TLE = np.concatenate(
            [
                part.load_TLE * (most_L / np.where(total_TL > 0, total_TL, 1.0))[:, :, None]
                for part, total_TL in zip(parts, total_PTL, strict=True)
            ]
        )
        weight_T, called = [], []
        for name, weight, part in zip(names, floats("loads.weights", weights), parts, strict=True):
            each = np.ones(part.shape[0]) if part.weight_T is None else part.weight_T
            weight_T.append(weight * each / each.sum())
            own = part.scenarios or tuple(str(t) for t in range(part.shape[0]))
            called += [name] if part.shape[0] == 1 else [f"{name}: {one}" for one in own]
        return cls(
            load_TLE=load_TLE,
            weight_T=np.concatenate(weight_T),
            layers=first.layers,
            skipped=first.skipped,
            scenarios=tuple(called),
            source=", ".join(names),
            notes=tuple(note for part in parts for note in part.notes),
        )

    @property
    def load_LE(self) -> FloatArray:
        """Expected loads over the scenarios, shape [L, E]."""
        if self.load_TLE.shape[0] == 1:
            return np.asarray(self.load_TLE[0])
        if self.weight_T is None:
            return np.asarray(self.load_TLE.mean(0))
        return np.asarray(np.tensordot(self.weight_T, self.load_TLE, 1))

    @property
    def load_LNE(self) -> FloatArray | None:
        """Expected loads by source node, shape [L, N, E]; None where unknown."""
        if self.load_TLNE is None:
            return None
        if self.weight_T is None:
            return np.asarray(self.load_TLNE.mean(0))
        return np.asarray(np.tensordot(self.weight_T, self.load_TLNE, 1))

    @property
    def load_LGE(self) -> FloatArray | None:
        """Expected loads by source GPU, shape [L, G, E]; None where unknown."""
        if self.load_TLGE is None:
            return None
        if self.weight_T is None:
            return np.asarray(self.load_TLGE.mean(0))
        return np.asarray(np.tensordot(self.weight_T, self.load_TLGE, 1))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Scenarios, layers, experts."""
        t, layers, experts = self.load_TLE.shape
        return t, layers, experts

    def select(self, layers: Sequence[int]) -> Loads:
        """The loads of some layers, given by the model's own index."""
        place = {layer: i for i, layer in enumerate(self.layers)}
        unknown = [layer for layer in layers if layer not in place]
        if unknown:
            raise ProblemError("layers", f"{unknown[0]} is not among the layers {span(self.layers)}")
        rows = sorted(place[layer] for layer in set(layers))
        by_node, by_gpu = (
            None if array is None else array[:, rows] for array in (self.load_TLNE, self.load_TLGE)
        )
        flow_LEE = self.flow_LEE
        if flow_LEE is not None:
            if rows != list(range(rows[0], rows[-1] + 1)):
                raise ProblemError(
                    "layers", "must follow each other where the loads have a flow between layers"
                )
            flow_LEE = flow_LEE[rows[:-1]]
        return self.replace(
            load_TLE=self.load_TLE[:, rows],
            layers=tuple(self.layers[i] for i in rows),
            load_TLNE=by_node,
            load_TLGE=by_gpu,
            flow_LEE=flow_LEE,
        )

    def __repr__(self) -> str:
        t, layers, experts = self.shape
        load_LE = self.load_LE
        mean_L = load_LE.mean(1)
        busy_L = mean_L > 0
        skew = float((load_LE.max(1)[busy_L] / mean_L[busy_L]).mean()) if busy_L.any() else 0.0
        hottest = f"hottest expert {skew:.2f} x mean" if busy_L.any() else "no tokens"
        parts = [f"{layers} layers x {experts} experts", hottest]
        if t > 1:
            parts.insert(0, f"{t} scenarios")
        source = f", from {printable(self.source)}" if self.source else ""
        if self.skipped:
            parts.append(f"dense layers {span(self.skipped)} skipped")
        return f"Loads({', '.join(parts)}{source})"


def _by_source(given: FloatArray, load_TLE: FloatArray, name: str, what: str) -> FloatArray:
    """Loads by source, checked to be the same loads, shape [T, L, sources, E]."""
    load_TLSE = floats(f"loads.{name}", given)
    if load_TLSE.ndim == 3:
        load_TLSE = load_TLSE[None]
    scenarios, layers, experts = load_TLE.shape
    if load_TLSE.ndim != 4 or load_TLSE.shape[::3] != (scenarios, experts) or load_TLSE.shape[1] != layers:
        raise ProblemError(
            f"loads.{name}",
            f"has shape {load_TLSE.shape}, must be [{scenarios}, {layers}, {what}, {experts}]",
        )
    if not np.allclose(load_TLSE.sum(2), load_TLE, rtol=1e-9, atol=1e-9):
        raise ProblemError(f"loads.{name}", f"does not sum to the loads over the {what}")
    return load_TLSE


def _indices(where: str, value: Iterable[object]) -> tuple[int, ...]:
    given: object = value
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ProblemError(where, f"is {given!r}, must be a list of layer numbers")
    return tuple([i if type(i) is int and i >= 0 else whole(where, i) for i in given])


def span(layers: Sequence[int]) -> str:
    """Render ``0-2, 5`` for ``(0, 1, 2, 5)``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
