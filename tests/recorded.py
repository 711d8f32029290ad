"""Recordings of every kind, written small from known loads: for tests and the readers' fuzz campaign."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["MAP", "STEPS", "TRACE", "Kind", "kinds", "slot_loads"]

_rng = np.random.default_rng(14)
STEPS = _rng.multinomial(512, _rng.dirichlet(np.full(8, 0.8)), size=(4, 3)).astype(np.int64)
"""Loads of four steps, [steps, layers, experts]; all layers of a step see the same tokens."""
TRACE = _rng.gumbel(size=(100, 3, 8)).argsort(2)[:, :, :2] % 8
"""The experts of 100 tokens, [tokens, layers, top-k]."""
MAP = np.stack([_rng.permutation([*range(8), 0, 3, 5]) for _ in range(3)])
"""From slots to experts, [layers, slots]."""
RANKS = 3
LAYERS = (4, 5, 6)


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
        The model's numbers of its layers.
    ranks : bool
        Whether each rank has a file of its own, with its number in the name.
    options : mapping
        What the reader has to be told.
    """

    name: str
    write: Callable[[Path], Path]
    load_LE: NDArray[Any]
    format: str
    layers: tuple[int, ...] = (0, 1, 2)
    ranks: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


def slot_loads(load_TLE: NDArray[Any]) -> NDArray[Any]:
    """Loads of slots, [.., layers, slots], whose sums by `MAP` are the loads of the experts."""
    out = np.zeros((*load_TLE.shape[:-1], MAP.shape[1]), dtype=np.int64)
    for layer, row in enumerate(MAP):
        for expert in range(8):
            slots = np.flatnonzero(row == expert)
            out[..., layer, slots[0]] = load_TLE[..., layer, expert]
            if len(slots) > 1:
                out[..., layer, slots[1]] = load_TLE[..., layer, expert] // 3
                out[..., layer, slots[0]] -= out[..., layer, slots[1]]
    return out


def shares(load: NDArray[Any]) -> list[NDArray[Any]]:
    """What each rank saw of loads."""
    first, second = load // 2, load // 3
    return [first, second, load - first - second]


def counted(trace: NDArray[Any]) -> NDArray[Any]:
    """Loads of a trace."""
    return np.stack([np.bincount(trace[:, i].ravel(), minlength=8) for i in range(trace.shape[1])])


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


def _long(load: NDArray[Any], lead: str = "", layers: tuple[int, ...] = (0, 1, 2)) -> str:
    return "".join(f"{lead}{layers[i]},{e},{x}\n" for (i, e), x in np.ndenumerate(load))


def _records(rank: int, load_TLE: NDArray[Any]) -> Callable[[Any], Any]:
    def content(torch: Any) -> Any:
        records = [
            {
                "forward_pass_id": 7 + i,
                "rank": rank,
                "gatherer_key": "primary",
                "global_physical_count": torch.tensor(step).int(),
            }
            for i, step in enumerate(slot_loads(load_TLE))
        ]
        return {"records": records, "last_physical_to_logical_map": torch.tensor(MAP)}

    return content


def _dump(rank: int, load_TLE: NDArray[Any]) -> Callable[[Path], Path]:
    written = np.concatenate([load_TLE, np.full((2, 3, 8), -77)])  # memory that was never written
    return _npz(
        f"loads_rank{rank}.npz",
        dump_version="mcore_ep_load_dump_v1",
        loads=written.transpose(1, 0, 2),
        layer_numbers=np.array(LAYERS),
        forward_counts=np.full(3, len(load_TLE)),
        ep_size=RANKS,
        global_rank=rank,
    )


def _statistics() -> Callable[[Path], Path]:
    files = {"meta": _document("meta_info.json", {"num_experts": 8, "num_experts_per_token": 2})}
    for rank, load_TLE in enumerate(shares(STEPS)):
        arrays = {f"{5 + t}_{LAYERS[i]}": load_TLE[t, i].copy() for t in range(4) for i in range(3)}
        files[f"rank{rank}"] = _safetensors(f"rank{rank}.safetensors", arrays)
        files[f"raw{rank}"] = _safetensors(
            f"rank{rank}_raw.safetensors", {"5_4": np.zeros((9, 2), dtype=np.int64)}
        )
    return _folder(files)


def _router_trace(rank: int, trace: NDArray[Any]) -> Callable[[Path], Path]:
    rows = [
        {
            "step": step,
            "stage": "pre_dispatch",
            "block": "decoder",
            "layer": i,
            "rank": rank,
            "num_tokens": len(part),
            "topk": 2,
            "top_indices": part[:, i].tolist(),
        }
        for step, part in enumerate(np.array_split(trace, 2))
        for i in range(3)
    ]
    extra = dict(rows[0], block="mtp", mtp_idx=0)
    return _lines(f"router_trace_rank{rank}.jsonl", [*rows, extra])


def _megatron_log() -> str:
    lines = []
    for step, load_LE in enumerate(STEPS):
        for rank in range(4):
            for layer in range(3):
                row = load_LE[layer, 2 * rank : 2 * rank + 2].tolist()
                lines.append(f"Rank={rank} iter={step + 10} layer={layer} tokens_per_expert={row}\n")
    return "".join(lines)


def kinds() -> list[Kind]:
    """Every kind of recording."""
    total = STEPS.sum(0)
    trace = counted(TRACE)
    return [*_engine_kinds(total, trace), *_own_kinds(total, trace)]


def _engine_kinds(total: NDArray[Any], trace: NDArray[Any]) -> list[Kind]:
    dense = np.concatenate([np.zeros((100, 1, 2), dtype=np.int64), TRACE], axis=1)
    meta = {"record_type": "meta", "num_layers": 3}
    stats = [
        {
            "record_type": "eplb_load_stats",
            "version": 1,
            "step": i,
            "expert_load": step.tolist(),
            "p2l_map": MAP.tolist(),
        }
        for i, step in enumerate(slot_loads(STEPS))
    ]
    by_rank = {
        rank: _torch(f"r_rank{rank}.pt", _records(rank, load)) for rank, load in enumerate(shares(STEPS))
    }
    return [
        Kind("sglang-json", _document("a.json", {"logical_count": STEPS.tolist()}), total, "sglang-json"),
        Kind(
            "sglang-stat",
            _torch("a.pt", lambda torch: {"rank": 0, "logical_count": torch.tensor(STEPS).int()}),
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
        Kind("tensorrt-llm", _statistics(), total, "tensorrt-llm", LAYERS, ranks=True),
        Kind(
            "megatron-dump",
            _folder({str(rank): _dump(rank, load) for rank, load in enumerate(shares(STEPS))}),
            total,
            "megatron-dump",
            LAYERS,
            ranks=True,
        ),
        Kind(
            "router-trace",
            _folder({str(rank): _router_trace(rank, TRACE[rank::3]) for rank in range(3)}),
            trace,
            "router-trace",
            ranks=True,
        ),
        Kind(
            "megatron-log",
            _text("tokens_per_expert.log", _megatron_log()),
            total,
            "megatron-log",
            options={"experts": 8},
        ),
        Kind("vllm-stats", _lines("a.jsonl", [meta, *stats]), total, "vllm-jsonl"),
        Kind(
            "vllm-window",
            _npz("a.npz", expert_load_window=slot_loads(STEPS), physical_to_logical_map=MAP),
            total,
            "vllm-npz",
        ),
        Kind(
            "routed-experts",
            _npz("a.npz", routed_experts=dense.astype(np.int32)),
            trace,
            "token-trace",
            (1, 2, 3),
        ),
        Kind("routed-experts-bare", _npy("a.npy", TRACE.astype(np.uint8)), trace, "token-trace"),
        Kind(
            "routed-experts-lines",
            _lines(
                "a.jsonl",
                [{"id": i, "routed_experts": part.tolist()} for i, part in enumerate(np.split(TRACE, 4))],
            ),
            trace,
            "token-trace",
        ),
    ]


def _own_kinds(total: NDArray[Any], trace: NDArray[Any]) -> list[Kind]:
    wide = "layer," + ",".join(f"expert_{e}" for e in range(8)) + "\n"
    rows = [",".join([str(i), *map(str, row)]) for i, row in enumerate(total.tolist())]
    lines = [
        {"step": t, "rank": rank, "layer": i, "tokens_per_expert": load_TLE[t, i].tolist()}
        for rank, load_TLE in enumerate(shares(STEPS))
        for t in range(4)
        for i in range(3)
    ]
    cells = [{"layer": i, "expert": e, "count": int(x)} for (i, e), x in np.ndenumerate(total)]
    named = {f"model.layers.{i}.mlp": row for i, row in zip(LAYERS, total.tolist(), strict=True)}
    by_layer = {
        f"layer_{i}": {f"expert_{e}": x for e, x in enumerate(row)} for i, row in enumerate(total.tolist())
    }
    header = "layer,expert,count\n"
    return [
        Kind("by-layer", _document("a.json", {"model": "m", "top_k": 2, **named}), total, "by-layer", LAYERS),
        Kind("by-layer-and-expert", _document("a.json", {"counts": by_layer}), total, "by-layer"),
        Kind(
            "by-number",
            _document("a.json", {str(i): row for i, row in enumerate(total.tolist())}),
            total,
            "by-layer",
        ),
        Kind(
            "by-expert",
            _document("a.json", {f"expert_{e}": total[:, e].tolist() for e in range(8)}),
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
            _text("a.csv", "".join(header + _long(total[i : i + 1], layers=(i,)) for i in range(3))),
            total,
            "csv",
        ),
        Kind(
            "table-steps",
            _text(
                "a.csv", "step,layer,expert,count\n" + "".join(_long(x, f"{t},") for t, x in enumerate(STEPS))
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
            _text("a.csv", "," + ",".join(map(str, range(8))) + "\n" + "\n".join(rows)),
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
                    for t, x in enumerate(STEPS.tolist())
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
                        f"layer{LAYERS[i]}.csv",
                        "expert,count\n" + "".join(f"{e},{x}\n" for e, x in enumerate(row)),
                    )
                    for i, row in enumerate(total.tolist())
                }
            ),
            total,
            "csv",
            LAYERS,
        ),
        Kind(
            "arrays-of-layers-and-ranks",
            _folder(
                {
                    f"{r}{i}": _npy(f"layer{i}_rank{r}.npy", x[:, i])
                    for r, x in enumerate(shares(STEPS))
                    for i in range(3)
                }
            ),
            total,
            "npy",
            ranks=True,
        ),
        Kind("matrix", _npy("a.npy", total), total, "npy"),
        Kind(
            "slots",
            _npy("a.npy", slot_loads(total)),
            total,
            "npy",
            options={"as_": "physical", "physical_to_logical": MAP},
        ),
    ]
