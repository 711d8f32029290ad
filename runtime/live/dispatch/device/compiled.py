"""What the kernels become on a GPU, also without one: Triton compiles for any of NVIDIA's."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from moeless_opt.problems.errors import UnsupportedFeatureError

__all__ = ["Compiled", "compiled"]

#: Names of arguments that point to something else than whole numbers of 64 bits.
INDICES = (
    "copies_E",
    "copies_S",
    "end_P",
    "first_G",
    "many",
    "node_R",
    "nth_E",
    "place_P",
    "place_S",
    "rank_EX",
    "rank_SX",
    "single_GC",
    "slot_EX",
    "wanted_S",
)
REALS = ("weight_EX", "total_E", "knot_K", "table_AK", "slope_AK", "rate_G", "t_N")


class Compiled(NamedTuple):
    """One kernel for one GPU: code, instructions in it, registers of a thread, accesses to spilled ones."""

    name: str
    ptx: str
    instructions: int
    registers: int
    spills: int


def compiled(name: str, *, capability: int = 90, warps: int = 1, **sizes: Any) -> Compiled:
    """Compile a kernel ahead of time.

    Parameters
    ----------
    name : str
        Of a kernel.
    capability : int
        Of the GPU: 90 is Hopper.
    warps : int
        Of a program.
    **sizes
        The kernel's compile-time arguments.

    Raises
    ------
    UnsupportedFeatureError
        Where kernels are interpreted in this process.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from moeless_opt.runtime.live.dispatch.device import _kernels, _row_kernels

    kernel = getattr(_kernels if name in _kernels.__all__ else _row_kernels, name)
    if _kernels.interpreted():
        raise UnsupportedFeatureError("TRITON_INTERPRET=1: kernels are interpreted here, not compiled")
    kinds = {}
    for argument in kernel.params:
        if argument.is_constexpr:
            kind = "constexpr"
        elif argument.do_not_specialize:
            kind = "i32"
        elif argument.name in REALS:
            kind = "*fp64"
        else:
            kind = "*i32" if argument.name in INDICES else "*i64"
        kinds[argument.name] = kind
    found: Any = compile(
        ASTSource(kernel, kinds, sizes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "enable_fp_fusion": False},
    )
    code, usage = _disassembled(found.asm["cubin"])
    return Compiled(
        name,
        found.asm["ptx"],
        len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code, re.MULTILINE)),
        max(map(int, re.findall(r"REG:(\d+)", usage)), default=0),
        len(re.findall(r"\b(?:STL|LDL)", code)),
    )


def _disassembled(binary: bytes) -> tuple[str, str]:
    """Instructions and use of registers, by the tool that comes with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        code, usage = (
            subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True).stdout
            for what in ("-sass", "-res-usage")
        )
    return code, usage
