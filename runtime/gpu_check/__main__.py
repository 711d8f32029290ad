"""Proves and measures on one GPU what the runtime claims, and writes a report; a dry run on a CPU."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import asdict
from pathlib import Path

__all__ = ["main"]


#: What is written into the folder.
FILES = ("report.json", "table.txt", "time_models.json")


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"is {text}, must be above 0 and finite")
    return value


def _open_folder(path: str) -> Path:
    """The folder, made if need be; what cannot be written is known before minutes are spent.

    Raises
    ------
    OSError
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass
    for file in map(folder.joinpath, FILES):
        if file.exists():
            with file.open("a"):
                pass
    return folder


def _measured(folder: Path) -> str:
    """On what GPU a report in the folder was measured; "" where there is none."""
    from moeless_opt.runtime.gpu_check.setting import DRY_RUN

    try:
        device = json.loads((folder / "report.json").read_text(encoding="utf-8"))["machine"]["device"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return "" if device == DRY_RUN else str(device)


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m moeless_opt.runtime.gpu_check",
        description=(__doc__ or "").splitlines()[0],
        epilog="Exit code: 0, or 1 if a line failed, or 2 if nothing was run.",
    )
    parser.add_argument(
        "--out", default="gpu_check", help="folder for report.json, table.txt and time_models.json"
    )
    parser.add_argument("--only", nargs="+", metavar="PART", help="just these parts")
    parser.add_argument(
        "--device", choices=("auto", "cuda", "cpu"), default="auto", help="cpu: a dry run with small shapes"
    )
    parser.add_argument("--seconds", type=_seconds, default=450.0, help="for all parts (default 450)")
    parser.add_argument(
        "--traces", action="store_true", help="keep the profiler's traces too: trace_*.json.gz, for Perfetto"
    )
    parser.add_argument("--list", action="store_true", help="what is looked at, without running it")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    args = _options().parse_args(arguments)
    from moeless_opt.runtime.gpu_check.processes import gpu_here

    found = args.device != "cpu" and gpu_here()
    if not found:
        # Kernels are interpreted in a dry run: Triton looks when it is imported.
        os.environ.setdefault("TRITON_INTERPRET", "1")
    from moeless_opt.problems.errors import MoelessError
    from moeless_opt.runtime.gpu_check import sheet
    from moeless_opt.runtime.gpu_check.run import PARTS, check_part, run_parts
    from moeless_opt.runtime.gpu_check.setting import Setting

    try:
        names = tuple(dict.fromkeys(args.only or PARTS))
        parts = [(name, check_part(name)) for name in names]
        if args.list:
            for name, part in parts:
                print(f"{name}: {part.TITLE}", *part.LINES, sep="\n  ")
            return 0
        if args.device == "cuda" and not found:
            print("error: --device cuda: torch finds no GPU here", file=sys.stderr)
            return 2
        folder = _open_folder(args.out)
        if not found and (device := _measured(folder)):
            print(
                f"error: {folder / 'report.json'} was measured on {device}, which a dry run would overwrite: "
                "give another --out",
                file=sys.stderr,
            )
            return 2
        setting = Setting.of("cuda" if found else "cpu", folder, args.traces)
    except (MoelessError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    began = time.monotonic()

    def tell(found: list[sheet.Line]) -> None:
        print(sheet.lines_table(found), flush=True)

    lines = run_parts(setting, names, seconds=args.seconds, on_part=tell)
    counts = Counter(line.status for line in lines)
    ended = ", ".join(f"{counts[status]} {status}" for status in ("measured", "dry", "failed"))
    ended += f"; {time.monotonic() - began:.0f} s"
    try:
        machine = setting.machine()
    except RuntimeError as error:  # a GPU that was lost is no reason to lose the report
        machine = {"device": f"unknown: {error}"}
    report = {
        "machine": machine,
        "shapes": {k: v for k, v in asdict(setting).items() if k not in ("device", "folder", "traces")},
        "counts": counts,
        "lines": [asdict(line) for line in lines],
    }
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (folder / "table.txt").write_text(f"{sheet.lines_table(lines)}\n{ended}\n", encoding="utf-8")
    print(ended)
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    # Nothing that is imported may begin to use the GPU: the parts are forked.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    warnings.simplefilter("ignore")
    sys.exit(main())
