"""Recordings of every kind, written small from known loads: for tests and the readers' fuzz campaign."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["MAP", "STEPS", "TRACE", "Kind", "World", "kinds", "slot_loads"]

RANKS = 3


@dataclass(frozen=True)
class World:
    """What is recorded: loads of a model's layers in some steps, or the experts that tokens chose.

    Parameters
    ----------
    steps_TLE : array
        Loads [steps, layers, experts]; all layers of a step see the same tokens.
    trace_PLK : array
        The experts of tokens [tokens, layers, top-k].
    map_LS : array
        From slots to experts, [layers, slots].
    """

    steps_TLE: NDArray[Any]
    trace_PLK: NDArray[Any]
    map_LS: NDArray[Any]

    @classmethod
    def drawn(
        cls, seed: int, steps: int = 4, layers: int = 3, experts: int = 8, top_k: int = 2, tokens: int = 100
    ) -> World:
        """One by chance; `experts` is even."""
        rng = np.random.default_rng(seed)
        skew = rng.dirichlet(np.full(experts, 0.8), size=layers)
        sizes = rng.choice(np.arange(300, 800), steps, replace=False)
        steps_TLE = np.stack([rng.multinomial(size, skew) for size in sizes]).astype(np.int64)
        trace = rng.gumbel(size=(tokens, layers, experts)).argsort(2)[:, :, :top_k]
        spare = rng.choice(experts, 3, replace=False)
        to_logical = np.stack([rng.permutation([*range(experts), *spare]) for _ in range(layers)])
        return cls(steps_TLE, trace, to_logical)

    @property
    def experts(self) -> int:
        """Experts of a layer."""
        return int(self.steps_TLE.shape[2])

    @property
    def layers(self) -> range:
        """Rows of the layers."""
        return range(self.steps_TLE.shape[1])

    @property
    def numbers(self) -> tuple[int, ...]:
        """The model's own numbers of the layers, where a kind says them."""
        return tuple(4 + i for i in self.layers)

    @property
    def total(self) -> NDArray[Any]:
        """Loads summed over the steps."""
        return np.asarray(self.steps_TLE.sum(0))

    def slots(self, load: NDArray[Any]) -> NDArray[Any]:
        """Loads of slots, [.., layers, slots], whose sums by the map are the loads of the experts."""
        out = np.zeros((*load.shape[:-1], self.map_LS.shape[1]), dtype=np.int64)
        for layer, row in enumerate(self.map_LS):
            for expert in range(self.experts):
                slots = np.flatnonzero(row == expert)
                out[..., layer, slots[0]] = load[..., layer, expert]
                if len(slots) > 1:
                    out[..., layer, slots[1]] = load[..., layer, expert] // 3
                    out[..., layer, slots[0]] -= out[..., layer, slots[1]]
        return out

    def counted(self) -> NDArray[Any]:
        """Loads of the trace."""
        rows = [np.bincount(self.trace_PLK[:, i].ravel(), minlength=self.experts) for i in self.layers]
        return np.stack(rows)


WORLD = World.drawn(14)
STEPS, TRACE, MAP = WORLD.steps_TLE, WORLD.trace_PLK, WORLD.map_LS


@dataclass(frozen=True)
class Kind:
    """One kind of recording.

    Parameters
    ----------
    name : str
        What it is.
    write : callable
        Writes it into a folder and returns the path to read.
    load_LE : array
        The loads that it holds, summed over its steps.
    format : str
        As what it is recognised.
    layers : tuple of int
        The model's numbers of its layers; None: 0, 1, ...
    ranks : bool
        Whether each rank has a file of its own, with its number in the name.
    options : mapping
        What the reader has to be told.
    """

    name: str
    write: Callable[[Path], Path]
    load_LE: NDArray[Any]
    format: str
    layers: tuple[int, ...] | None = None
    ranks: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


def slot_loads(load: NDArray[Any]) -> NDArray[Any]:
    """Loads of slots of `WORLD`."""
    return WORLD.slots(load)


def shares(load: NDArray[Any]) -> list[NDArray[Any]]:
    """What each rank saw of loads."""
    first, second = load // 2, load // 3
    return [first, second, load - first - second]


def _text(name: str, text: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_text(text)
        return folder / name

    return write


def _document(name: str, document: object) -> Callable[[Path], Path]:
    return _text(name, json.dumps(document))


def _lines(name: str, rows: list[dict[str, Any]]) -> Callable[[Path], Path]:
    return _text(name, "".join(json.dumps(row) + "\n" for row in rows))


def _npz(name: str, **arrays: Any) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        np.savez(folder / name, **arrays)
        return folder / name

    return write


def _npy(name: str, array: NDArray[Any]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        np.save(folder / name, array)
        return folder / name

    return write


def _folder(files: Mapping[str, Callable[[Path], Path]]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        inner = folder / "run"
        inner.mkdir(exist_ok=True)
        for one in files.values():
            one(inner)
        return inner

    return write


def _torch(name: str, content: Callable[[Any], Any]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        import torch

        torch.save(content(torch), folder / name)
        return folder / name

    return write


def _safetensors(name: str, arrays: dict[str, NDArray[Any]]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        from safetensors.numpy import save_file

        save_file(arrays, folder / name)
        return folder / name

    return write


def _long(load: NDArray[Any], lead: str = "", first: int = 0) -> str:
    return "".join(f"{lead}{first + i},{e},{x}\n" for (i, e), x in np.ndenumerate(load))


def _records(world: World, rank: int, load_TLE: NDArray[Any]) -> Callable[[Any], Any]:
    def content(torch: Any) -> Any:
        records = [
            {
                "forward_pass_id": 7 + i,
                "rank": rank,
                "gatherer_key": "primary",
                "global_physical_count": torch.tensor(step).int(),
            }
            for i, step in enumerate(world.slots(load_TLE))
        ]
        return {"records": records, "last_physical_to_logical_map": torch.tensor(world.map_LS)}

    return content


def _dump(world: World, rank: int, load_TLE: NDArray[Any]) -> Callable[[Path], Path]:
    written = np.concatenate(
        [load_TLE, np.full((2, *load_TLE.shape[1:]), -77)]
    )  # memory that was never written
    return _npz(
        f"loads_rank{rank}.npz",
        dump_version="mcore_ep_load_dump_v1",
        loads=written.transpose(1, 0, 2),
        layer_numbers=np.array(world.numbers),
        forward_counts=np.full(len(world.layers), len(load_TLE)),
        ep_size=RANKS,
        global_rank=rank,
    )


def _statistics(world: World) -> Callable[[Path], Path]:
    files = {"meta": _document("meta_info.json", {"num_experts": world.experts, "num_experts_per_token": 2})}
    for rank, load_TLE in enumerate(shares(world.steps_TLE)):
        arrays = {
            f"{5 + t}_{4 + i}": load_TLE[t, i].copy() for t in range(len(load_TLE)) for i in world.layers
        }
        files[f"rank{rank}"] = _safetensors(f"rank{rank}.safetensors", arrays)
        files[f"raw{rank}"] = _safetensors(
            f"rank{rank}_raw.safetensors", {"5_4": np.zeros((9, 2), dtype=np.int64)}
        )
    return _folder(files)


def _router_trace(world: World, rank: int, trace: NDArray[Any]) -> Callable[[Path], Path]:
    rows = [
        {
            "step": step,
            "stage": "pre_dispatch",
            "block": "decoder",
            "layer": i,
            "rank": rank,
            "num_tokens": len(part),
            "topk": trace.shape[2],
            "top_indices": part[:, i].tolist(),
        }
        for step, part in enumerate(np.array_split(trace, 2))
        for i in world.layers
    ]
    extra = dict(rows[0], block="mtp", mtp_idx=0)
    return _lines(f"router_trace_rank{rank}.jsonl", [*rows, extra])


def _megatron_log(world: World) -> str:
    lines = []
    for step, load_LE in enumerate(world.steps_TLE):
        for rank in range(2):
            for layer in world.layers:
                half = world.experts // 2
                row = load_LE[layer, half * rank : half * (rank + 1)].tolist()
                lines.append(f"Rank={rank} iter={step + 10} layer={layer} tokens_per_expert={row}\n")
    return "".join(lines)


def kinds(world: World = WORLD) -> list[Kind]:
    """Every kind of recording."""
    total, trace = world.total, world.counted()
    return [*_engine_kinds(world, total, trace), *_own_kinds(world, total)]


def _engine_kinds(world: World, total: NDArray[Any], trace: NDArray[Any]) -> list[Kind]:
    dense = np.concatenate([np.zeros_like(world.trace_PLK[:, :1]), world.trace_PLK], axis=1)
    meta = {"record_type": "meta", "num_layers": len(world.layers)}
    stats = [
        {
            "record_type": "eplb_load_stats",
            "version": 1,
            "step": i,
            "expert_load": step.tolist(),
            "p2l_map": world.map_LS.tolist(),
        }
        for i, step in enumerate(world.slots(world.steps_TLE))
    ]
    by_rank = {
        rank: _torch(f"r_rank{rank}.pt", _records(world, rank, load))
        for rank, load in enumerate(shares(world.steps_TLE))
    }
    return [
        Kind(
            "sglang-json",
            _document("a.json", {"logical_count": world.steps_TLE.tolist()}),
            total,
            "sglang-json",
        ),
        Kind(
            "sglang-stat",
            _torch("a.pt", lambda torch: {"rank": 0, "logical_count": torch.tensor(world.steps_TLE).int()}),
            total,
            "sglang-torch",
        ),
        Kind(
            "sglang-per-pass",
            _folder({str(k): v for k, v in by_rank.items()}),
            total,
            "sglang-recorder",
            ranks=True,
        ),
        Kind("tensorrt-llm", _statistics(world), total, "tensorrt-llm", world.numbers, ranks=True),
        Kind(
            "megatron-dump",
            _folder(
                {str(rank): _dump(world, rank, load) for rank, load in enumerate(shares(world.steps_TLE))}
            ),
            total,
            "megatron-dump",
            world.numbers,
            ranks=True,
        ),
        Kind(
            "router-trace",
            _folder(
                {str(rank): _router_trace(world, rank, world.trace_PLK[rank::RANKS]) for rank in range(RANKS)}
            ),
            trace,
            "router-trace",
            ranks=True,
        ),
        Kind(
            "megatron-log",
            _text("tokens_per_expert.log", _megatron_log(world)),
            total,
            "megatron-log",
            options={"experts": world.experts},
        ),
        Kind("vllm-stats", _lines("a.jsonl", [meta, *stats]), total, "vllm-jsonl"),
        Kind(
            "vllm-window",
            _npz(
                "a.npz", expert_load_window=world.slots(world.steps_TLE), physical_to_logical_map=world.map_LS
            ),
            total,
            "vllm-npz",
        ),
        Kind(
            "routed-experts",
            _npz("a.npz", routed_experts=dense.astype(np.int32)),
            trace,
            "token-trace",
            tuple(i + 1 for i in world.layers),
        ),
        Kind("routed-experts-bare", _npy("a.npy", world.trace_PLK.astype(np.uint8)), trace, "token-trace"),
        Kind(
            "routed-experts-lines",
            _lines(
                "a.jsonl",
                [
                    {"id": i, "routed_experts": part.tolist()}
                    for i, part in enumerate(np.array_split(world.trace_PLK, 4))
                ],
            ),
            trace,
            "token-trace",
        ),
    ]


def _own_kinds(world: World, total: NDArray[Any]) -> list[Kind]:
    wide = "layer," + ",".join(f"expert_{e}" for e in range(world.experts)) + "\n"
    rows = [",".join([str(i), *map(str, row)]) for i, row in enumerate(total.tolist())]
    lines = [
        {"step": t, "rank": rank, "layer": i, "tokens_per_expert": load_TLE[t, i].tolist()}
        for rank, load_TLE in enumerate(shares(world.steps_TLE))
        for t in range(len(load_TLE))
        for i in world.layers
    ]
    cells = [{"layer": i, "expert": e, "count": int(x)} for (i, e), x in np.ndenumerate(total)]
    named = {f"model.layers.{i}.mlp": row for i, row in zip(world.numbers, total.tolist(), strict=True)}
    by_layer = {
        f"layer_{i}": {f"expert_{e}": x for e, x in enumerate(row)} for i, row in enumerate(total.tolist())
    }
    header = "layer,expert,count\n"
    return [
        Kind(
            "by-layer",
            _document("a.json", {"model": "m", "top_k": 2, **named}),
            total,
            "by-layer",
            world.numbers,
        ),
        Kind("by-layer-and-expert", _document("a.json", {"counts": by_layer}), total, "by-layer"),
        Kind(
            "by-number",
            _document("a.json", {str(i): row for i, row in enumerate(total.tolist())}),
            total,
            "by-layer",
        ),
        Kind(
            "by-expert",
            _document("a.json", {f"expert_{e}": total[:, e].tolist() for e in range(world.experts)}),
            total,
            "by-expert",
        ),
        Kind(
            "npz-by-layer",
            _npz("a.npz", **{f"layer_{i}": row for i, row in enumerate(total)}),
            total,
            "by-layer",
        ),
        Kind(
            "by-rank",
            _document("a.json", {f"rank{r}": x.tolist() for r, x in enumerate(shares(total))}),
            total,
            "by-rank",
        ),
        Kind("lines", _lines("a.jsonl", lines), total, "json-lines"),
        Kind("list-of-cells", _document("a.json", cells), total, "csv"),
        Kind("lines-of-cells", _lines("a.jsonl", cells), total, "csv"),
        Kind("table", _text("a.csv", header + _long(total)), total, "csv"),
        Kind(
            "tables-joined",
            _text("a.csv", "".join(header + _long(total[i : i + 1], first=i) for i in world.layers)),
            total,
            "csv",
        ),
        Kind(
            "table-steps",
            _text(
                "a.csv",
                "step,layer,expert,count\n"
                + "".join(_long(x, f"{t},") for t, x in enumerate(world.steps_TLE)),
            ),
            total,
            "csv",
        ),
        Kind(
            "table-ranks",
            _text(
                "a.csv",
                "rank,layer,expert,count\n" + "".join(_long(x, f"{r},") for r, x in enumerate(shares(total))),
            ),
            total,
            "csv",
        ),
        Kind("wide", _text("a.csv", wide + "\n".join(rows)), total, "csv-wide"),
        Kind(
            "wide-pandas",
            _text("a.csv", "," + ",".join(map(str, range(world.experts))) + "\n" + "\n".join(rows)),
            total,
            "csv-wide",
        ),
        Kind(
            "wide-steps",
            _text(
                "a.csv",
                "step,"
                + wide
                + "\n".join(
                    ",".join([str(t), str(i), *map(str, row)])
                    for t, x in enumerate(world.steps_TLE.tolist())
                    for i, row in enumerate(x)
                ),
            ),
            total,
            "csv-wide",
        ),
        Kind(
            "tables-of-ranks",
            _folder({str(r): _text(f"rank{r}.csv", header + _long(x)) for r, x in enumerate(shares(total))}),
            total,
            "csv",
            ranks=True,
        ),
        Kind(
            "tables-of-layers",
            _folder(
                {
                    str(i): _text(
                        f"layer{world.numbers[i]}.csv",
                        "expert,count\n" + "".join(f"{e},{x}\n" for e, x in enumerate(row)),
                    )
                    for i, row in enumerate(total.tolist())
                }
            ),
            total,
            "csv",
            world.numbers,
        ),
        Kind(
            "arrays-of-layers-and-ranks",
            _folder(
                {
                    f"{r}{i}": _npy(f"layer{i}_rank{r}.npy", x[:, i])
                    for r, x in enumerate(shares(world.steps_TLE))
                    for i in world.layers
                }
            ),
            total,
            "npy",
            ranks=True,
        ),
        Kind("matrix", _npy("a.npy", total), total, "npy"),
        Kind(
            "slots",
            _npy("a.npy", world.slots(total)),
            total,
            "npy",
            options={"as_": "physical", "physical_to_logical": world.map_LS},
        ),
    ]
