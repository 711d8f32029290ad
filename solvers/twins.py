"""What compiled twins of plain kernels share: names in Numba's cache, and how they run and are stopped."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["Asked", "in_cache", "source_name", "until_stopped"]

_ASK = 0.02  # seconds between two questions to the stop


def source_name(task: str, *files: Path) -> str:
    """What the compiled form of these very sources is called in Numba's cache."""
    sources = b"".join(file.read_bytes() for file in files)
    return f"{task}_{hashlib.sha256(sources).hexdigest()[:16]}"


def in_cache(name: str, source: Path) -> bool:
    """Whether Numba's cache, which lies beside a source unless told otherwise, has a compiled form."""
    folder = Path(os.environ.get("NUMBA_CACHE_DIR") or source.parent / "__pycache__")
    return any(folder.rglob(f"*{name}*.nbc"))


class Asked:
    """A stop as a plain kernel sees it: an array whose entries are 1 once it says so."""

    def __init__(self, stop: Callable[[], object]) -> None:
        self._stop = stop

    def __getitem__(self, _: int) -> int:
        return int(bool(self._stop()))


def until_stopped(
    calls: Iterable[Callable[[], object]], told: NDArray[np.uint8], stop: Callable[[], object]
) -> None:
    """Make calls that let the interpreter's lock go, a thread each; `told[0]` is 1 once the stop says so."""
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        try:
            told[0] = bool(stop())
            left = {pool.submit(call) for call in calls}
            while left:
                done, left = wait(left, timeout=_ASK)
                for one in done:
                    one.result()
                told[0] |= bool(stop())
        except BaseException:
            told[0] = 1
            raise
