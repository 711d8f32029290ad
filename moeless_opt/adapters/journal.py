"""What a plug-in leaves behind: a line for every call, in a log and in a file, and the loads that it saw."""

from __future__ import annotations

import io
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from moeless_opt.adapters.options import PolicyOptions
from moeless_opt.problems.arrays import FloatArray
from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.files import atomic_write

__all__ = ["Journal"]


class Journal:
    """The log, the file of lines and the folder of recordings of one engine worker.

    Files are written where `main` says so, by one rank of all. What cannot be written is told once and is
    no reason to stop.

    Parameters
    ----------
    options : PolicyOptions
        Where to.
    logger : logging.Logger
        One that the engine shows.

    Raises
    ------
    ProblemError
        If the folders for the files do not exist and cannot be made.
    """

    def __init__(self, options: PolicyOptions, logger: logging.Logger) -> None:
        self.options, self.logger, self.calls = options, logger, 0
        self._told = False
        for name, folder in (
            ("record", options.record),
            ("log", options.log and str(Path(options.log).parent)),
        ):
            if folder:
                try:
                    os.makedirs(folder, exist_ok=True)
                except OSError as error:
                    raise ProblemError(name, f"cannot write to {folder!r}: {error.strerror}") from None

    def note(self, main: bool, milliseconds: float, figures: dict[str, Any]) -> None:
        """One call and what it did."""
        self.calls += 1
        if not main:
            return
        line: dict[str, Any] = {"call": self.calls, "time": round(time.time(), 3)}
        line |= {"milliseconds": round(milliseconds, 3)} | figures
        told = ", ".join(f"{key} {value}" for key, value in line.items() if value != "")
        self.logger.info("moeless-opt: %s", told)
        if self.options.log:
            try:
                with open(self.options.log, "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as error:
                self._cannot(self.options.log, error)

    def record(self, main: bool, load_LE: FloatArray) -> None:
        """The loads of a window, as a recording."""
        if not main or not self.options.record or not load_LE.any():
            return
        buffer = io.BytesIO()
        np.savez_compressed(buffer, logical_count=load_LE.astype(np.int64))
        path = Path(self.options.record) / f"loads-{time.time_ns() // 1000000}.npz"
        try:
            atomic_write(path, buffer.getvalue())
        except (OSError, ProblemError) as error:
            self._cannot(str(path), error)

    def _cannot(self, path: str, error: Exception) -> None:
        if not self._told:
            self.logger.warning("moeless-opt: %s cannot be written: %s", path, error)
        self._told = True
