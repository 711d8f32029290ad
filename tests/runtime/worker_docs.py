"""Runs the Python of docs/runtime.md on one rank, with a small model and what the page takes for given."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from worlds import EXPERT_WIDTH, EXPERTS, HIDDEN, batch, join, report, tiny_model

from moeless_opt.problems.spec.architecture import ModelSpec
from moeless_opt.runtime.checkpoint.parts import causal_positions
from moeless_opt.runtime.predict.tuning import save_tuned

PAGE = Path(__file__).resolve().parents[2] / "docs" / "runtime.md"
LAYERS = 3


def main() -> None:
    """All blocks in order, in one namespace and an empty folder; each finds the model detached."""
    join()
    os.chdir(os.environ["WORLD_FOLDER"])
    model = tiny_model(layers=LAYERS)
    save_tuned({}, "gates.safetensors")
    spec = ModelSpec(
        name="tiny", layers=LAYERS, experts=EXPERTS, top_k=2, hidden=HIDDEN, ffn=EXPERT_WIDTH, bits=32
    )
    given: dict[str, Any] = {
        "torch": torch,
        "model": model,
        "batch": batch(0),
        "traffic": [batch(0, step) for step in range(20)],
        "positions": causal_positions(batch(0)),
        "spec": spec,
        "folder": "home",
    }
    text, ran = PAGE.read_text(encoding="utf-8"), 0
    for match in re.finditer(r"^```py\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        line = text[: match.start()].count("\n") + 1
        exec(compile("\n" * line + match[1], str(PAGE), "exec", dont_inherit=True), given)
        given["live"].detach()
        ran += 1
    report(ran)


if __name__ == "__main__":
    main()
