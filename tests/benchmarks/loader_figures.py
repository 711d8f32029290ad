"""Print the loader's figures: ``python tests/benchmarks/loader_figures.py [GB]`` from the repository root.

For each architecture, the largest difference of the logits from those of `transformers` (float32, small
random checkpoints in the real layout); then time and peak memory for a Mixtral layout of the given size
(default 0.7 GB), against loading the files whole.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

warnings.simplefilter("ignore")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

STREAMED = """
from moeless_opt.runtime.checkpoint.load import load_checkpoint
model = load_checkpoint(sys.argv[1], device="cpu")
"""
WHOLE = """
from pathlib import Path
from safetensors.torch import load_file
from moeless_opt.runtime.checkpoint.load import build_model, recipe_of
files = sorted(Path(sys.argv[1]).glob("*.safetensors"))
tensors = {k: v.clone() for f in files for k, v in load_file(f).items()}
model = build_model(recipe_of(sys.argv[1]), torch.bfloat16)
for p in model.parameters():
    p.data.zero_()  # what load_state_dict would write
"""
MEASURE = """
import sys, threading, time, warnings
warnings.simplefilter("ignore")
import torch, megatron.core, moeless_opt.runtime.checkpoint.load
def anonymous():
    return next(int(x.split()[1]) * 1024 for x in open("/proc/self/status") if x.startswith("RssAnon"))
peak, stop, start, began = 0, False, anonymous(), time.perf_counter()
def watch():
    global peak
    while not stop:
        peak = max(peak, anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
{body}
stop = True
thread.join()
size = sum(p.nbytes for p in model.parameters())
print(f"{{(max(peak, anonymous()) - start) / size:.3f}} x the model's {{size / 1e6:.0f}} MB, "
      f"{{time.perf_counter() - began:.1f}} s")
"""


def main() -> None:
    """Print all figures."""
    import torch

    spec = importlib.util.spec_from_file_location("cases", ROOT / "tests" / "runtime" / "test_loader.py")
    assert spec is not None
    assert spec.loader is not None
    cases = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cases)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for name in cases.CHECKPOINTS:
            reference = cases.write_checkpoint(name, Path(folder) / name)
            apart = cases.difference(reference, cases.load_checkpoint(Path(folder) / name))
            print(f"{name:10} largest difference of the logits {apart:.1e}", flush=True)
        big = Path(folder) / "big"
        gigabytes = float(sys.argv[1]) if len(sys.argv) > 1 else 0.7
        layers = max(1, round(gigabytes * 1e9 / (8 * 3 * 1024 * 3584 * 2)))
        shape = {"hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": layers}
        cases.write_checkpoint("mixtral", big, shards="500MB", dtype=torch.bfloat16, **shape)
        for title, body in (("streamed", STREAMED), ("whole files", WHOLE)):
            done = subprocess.run(
                [sys.executable, "-c", MEASURE.format(body=body), str(big)],
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
                check=True,
            )
            print(f"{title:12} peak memory {done.stdout.strip()}", flush=True)


if __name__ == "__main__":
    main()
