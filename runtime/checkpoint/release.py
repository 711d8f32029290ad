"""Which releases of megatron-core are supported, said before one that is not fails somewhere inside."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

__all__ = ["check_megatron"]

#: Tested are 0.16.1 (Python 3.11) and 0.19.2 (from Python 3.12).
FIRST, BEYOND = (0, 16), (0, 20)
#: From here on megatron-core imports triton without naming it among its needs.
TRITON = (0, 17)


def check_megatron() -> None:
    """Refuse a megatron-core that is not supported; whether there is one its own import tells.

    Raises
    ------
    ImportError
    """
    try:
        found = version("megatron-core")
    except PackageNotFoundError:
        return
    release = tuple(int(part) for part in re.findall(r"\d+", found)[:2])
    if not FIRST <= release < BEYOND:
        raise ImportError(
            f"megatron-core {found} is not supported, 0.16.1 to 0.19 are: "
            "pip install 'megatron-core>=0.16.1,<0.20'"
        )
    if release >= TRITON and find_spec("triton") is None:
        raise ImportError(f"megatron-core {found} imports triton, which is not installed: pip install triton")
