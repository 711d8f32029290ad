"""Runs the parts, each in a process of its own and within its time, and gathers their lines."""

from __future__ import annotations

import importlib
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moeless_opt.problems.errors import ProblemError
from moeless_opt.runtime.gpu_check.processes import start, stop_all, wait_for
from moeless_opt.runtime.gpu_check.setting import Setting
from moeless_opt.runtime.gpu_check.sheet import Line, Sheet, read_lines, told

__all__ = ["PARTS", "check_part", "run_parts"]

#: Modules of this room, in the order in which they run.
PARTS = ("exactness", "waits", "split", "overhead", "curves", "predictor", "collectives", "staged", "loss")


def check_part(name: str) -> Any:
    """The module of a part.

    Raises
    ------
    ProblemError
        If there is none of the name.
    """
    if name not in PARTS:
        raise ProblemError("part", f"{name!r} is unknown; there are {', '.join(PARTS)}")
    return importlib.import_module(f"moeless_opt.runtime.gpu_check.{name}")


def run_parts(
    setting: Setting,
    names: Sequence[str] = PARTS,
    *,
    seconds: float = 450.0,
    on_part: Callable[[list[Line]], None] = lambda _: None,
) -> list[Line]:
    """Run parts one after the other.

    Parameters
    ----------
    setting : Setting
        Where, and with which shapes.
    names : sequence of str
        Which ones.
    seconds : float
        For all of them; what is not begun by then has failed.
    on_part : callable, optional
        Gets the lines of a part when it has ended.

    Returns
    -------
    list of Line
        All lines of all parts, whatever became of them.
    """
    modules = [check_part(name) for name in names]
    deadline = time.monotonic() + seconds
    lines: list[Line] = []
    for name, module in zip(names, modules, strict=True):
        # Machines without a GPU may be busy with other things.
        limit = module.SECONDS * (4.0 if setting.dry else 1.0)
        left = min(limit, deadline - time.monotonic())
        if left <= 0:
            why = f"not begun: the {seconds:g} s for all parts were over"
            found = [Line(part=name, name=one, status="failed", reason=why) for one in module.LINES]
        else:
            with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
                found = _run(setting, name, module, Path(folder), left)
        on_part(found)
        lines += found
    return lines


def _run(setting: Setting, name: str, module: Any, folder: Path, seconds: float) -> list[Line]:
    sheet = Sheet(name, setting.dry, folder / "sheet")

    def work() -> None:
        try:
            module.check(setting, sheet)
        except Exception as error:
            traceback.print_exc()
            sheet.end(told(error))
        else:
            sheet.end()

    log = folder / "log"
    child = start(work, log)
    codes = wait_for([child], seconds)
    stop_all([child], codes)
    ended = ""
    if codes[0] is None:
        ended = f"the part was ended after {seconds:.0f} s"
    elif codes[0]:
        ended = f"the part's process ended with {codes[0]}"
    found = read_lines(name, module.LINES, sheet.path, ended)
    if any(line.status == "failed" for line in found):
        print(f"--- {name}:\n{log.read_text(errors='replace')[-4000:]}", file=sys.stderr, flush=True)
    return found
