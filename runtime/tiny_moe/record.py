"""Record what gates say ahead: the tiny MoE's predictions on held-out text, beside what its tokens chose.

``python -m moeless_opt.runtime.tiny_moe.record --cache FOLDER`` cuts the tiny MoE's held-out text into
requests that do not overlap, records hidden states and routes, trains gates for every layer and distance on
some of the requests, and writes what plain and trained gates say of others:
``runtime/data/tiny_moe_foresight.npz``, which the simulator plays (`simulate.foresight`). FOLDER keeps the
packages (a Debian machine: they come by ``apt-get download``, as for the training) and the recording. About
two minutes, one of them the first time only.
"""

from __future__ import annotations

import argparse
import io
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moeless_opt.problems.arrays import IntArray
from moeless_opt.runtime.predict import Affinity, GatePredictor, fine_tune, plain_gates
from moeless_opt.runtime.simulate import tiny_moe_predictions_file
from moeless_opt.runtime.tiny_moe import model as tiny_moe
from moeless_opt.runtime.tiny_moe.corpus import DOMAINS, build_corpora
from moeless_opt.runtime.tiny_moe.scores import TokenRecord, record_requests

__all__ = ["DISTANCES", "foretell", "held_out_requests", "main", "parts", "write_npz"]

PER_DOMAIN, TRAIN, PROFILE = 100, 48, 12  # requests; the rest are for tests
DISTANCES = (1, 2, 3, 4, 5)
UNIT = 1 / 4  # of the stored chances: in decode (64 tokens) it adds 0.003 to a distance of 0.071


def parts() -> IntArray:
    """Which requests train (0), profile (1) and test (2), [requests]."""
    kinds = np.repeat([0, 1, 2], [TRAIN, PROFILE, PER_DOMAIN - TRAIN - PROFILE])
    return np.asarray(np.tile(kinds, len(DOMAINS)))


def held_out_requests(cache: Path) -> TokenRecord:
    """Requests of held-out text, `PER_DOMAIN` of each domain, none overlapping; kept in `cache`."""
    file = cache / "predictor_recording.npz"
    if file.exists():
        with np.load(file) as kept:
            arrays = {name: kept[name] for name in kept.files}
        return TokenRecord(
            hidden_TLH=torch.from_numpy(arrays["hidden"]),
            experts_TLK=arrays["experts"],
            offsets=arrays["offsets"],
            domain=arrays["domain"],
            experts=tiny_moe.EXPERTS,
        )
    corpora = build_corpora(cache)
    rng = np.random.default_rng(0)
    texts: list[bytes] = []
    for name in DOMAINS:
        text = corpora[name].held_out
        lengths = np.exp(rng.normal(np.log(256), 0.6, size=PER_DOMAIN)).clip(32, 511).astype(int)
        gap, at = (text.size - int(lengths.sum())) // PER_DOMAIN, 0
        for length in lengths.tolist():
            texts.append(text[at : at + length].tobytes())
            at += length + gap
    made = record_requests(tiny_moe.load(), texts, np.repeat(np.arange(len(DOMAINS)), PER_DOMAIN).tolist())
    np.savez(
        file,
        hidden=made.hidden_TLH.numpy(),
        experts=made.experts_TLK,
        offsets=made.offsets,
        domain=made.domain,
    )
    return made


@torch.no_grad()
def foretell(
    made: TokenRecord, requests: IntArray, plain: GatePredictor, tuned: GatePredictor
) -> dict[str, NDArray[Any]]:
    """What gates say of some requests: ``chosen_gate`` and ``chance_tuned`` of `Predictions`.

    Chances are rounded to whole units such that their running sums over the tokens are right to half a unit.
    """
    rows = made.rows(requests.tolist())
    hidden_TLH = made.hidden_TLH[torch.from_numpy(rows)].float()
    top_k = made.experts_TLK.shape[2]
    shape = (len(rows), made.layers, len(DISTANCES))
    chosen = np.zeros((*shape, top_k), dtype=np.uint8)
    chance = np.zeros((*shape, made.experts), dtype=np.uint8)
    for d in DISTANCES:
        for layer in range(made.layers - d):
            score_TE = plain.gate(layer, d).scores(hidden_TLH[:, layer])
            chosen[:, layer + d, d - 1] = score_TE.topk(top_k, dim=-1).indices.numpy()
            sums_TE = tuned.gate(layer, d).chosen(hidden_TLH[:, layer]).double().cumsum(0).numpy()
            chance[:, layer + d, d - 1] = np.diff(np.rint(sums_TE / UNIT), axis=0, prepend=0)
    return {"chosen_gate": chosen, "chance_tuned": chance, "unit": np.array(UNIT)}


def write_npz(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write an archive that `np.load` reads, packed tighter than `np.savez_compressed` does."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, np.asarray(array), allow_pickle=False)
            # A fixed date: the same arrays make the same file.
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(2024, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_LZMA
            archive.writestr(entry, buffer.getvalue())


def main() -> None:
    """Record, train, write, and say what was written."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "moeless-opt")
    parser.add_argument("--output", type=Path, default=tiny_moe_predictions_file())
    parser.add_argument("--per-domain", type=int, default=4, help="requests of each domain (default 4)")
    args = parser.parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    made, part = held_out_requests(args.cache), parts()
    gates = plain_gates(tiny_moe.load())
    train, profile = (np.flatnonzero(part == i) for i in (0, 1))
    tuning = fine_tune(gates, made.pairs(train), made.pairs(profile), distances=DISTANCES, threshold=2.0)
    test = part == 2
    requests = np.concatenate(
        [np.flatnonzero(test & (made.domain == d))[: args.per_domain] for d in range(len(DOMAINS))]
    )
    affinity = Affinity(made.layers, made.experts, furthest=max(DISTANCES))
    affinity.learn(made.experts_TLK[made.rows(train.tolist())])
    token_R = np.diff(made.offsets)[requests]
    arrays = {
        "experts": made.experts_TLK[made.rows(requests.tolist())],
        "offsets": np.concatenate([[0], np.cumsum(token_R)]),
        "domain": made.domain[requests],
        "domain_names": np.array(DOMAINS),
        "transitions": affinity.transitions_DLEE.astype(np.uint32),
        **foretell(made, requests, GatePredictor(gates), GatePredictor(gates, tuning.tuned)),
    }
    write_npz(args.output, arrays)
    size = args.output.stat().st_size
    print(
        f"{args.output}: {len(requests)} requests, {int(token_R.sum())} tokens, {size / 1e3:.0f} kB",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
