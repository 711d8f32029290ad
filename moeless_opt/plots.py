"""Pictures of plans."""

from __future__ import annotations

import io
import warnings
from importlib.util import find_spec
from os import PathLike
from typing import Any

import numpy as np

from moeless_opt.problems.arrays import FloatArray
from moeless_opt.problems.errors import SolverUnavailableError
from moeless_opt.problems.files import format_of
from moeless_opt.problems.plan import Judged, Plan, judged
from moeless_opt.problems.spec import Problem, contiguous, equal_shares
from moeless_opt.problems.text import printable

__all__ = ["need_matplotlib", "picture", "picture_format", "plain_title", "plot_loads"]

_UNDATED: dict[str, dict[str, Any]] = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
"""Formats of pictures, and what keeps the time of drawing out of them."""


def need_matplotlib() -> None:
    """Say before any work, not after it, that nothing can be drawn.

    Raises
    ------
    SolverUnavailableError
        If matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise SolverUnavailableError(
            "--plot: needs a package that is missing: pip install 'moeless-opt[plot]'"
        )


def picture_format(path: str | PathLike[str]) -> str:
    """The format of a picture by its file's name, in any case: ``png``, ``svg`` or ``pdf``.

    Raises
    ------
    FormatError
        If the suffix is another. Where there is none (``/dev/stdout``) it is ``png``.
    """
    return format_of(path, [f".{known}" for known in _UNDATED], default=".png")[1:]


def picture(figure: Any, form: str, *, dpi: float | None = None) -> bytes:
    """A figure of matplotlib as a picture of that format."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of letters in names that the font lacks
        figure.savefig(buffer, format=form, dpi=dpi or figure.dpi, metadata=_UNDATED[form])
    return buffer.getvalue()


def plain_title(name: str) -> str:
    """A name as a picture shows it: no mathematics, nothing that cannot be printed."""
    return printable(name).replace("$", r"\$")


def plot_loads(problem: Problem, plan: Plan, *, form: str = "png") -> bytes:
    """Draw each GPU's time in every layer as a heat map, before and after, on one scale.

    Before is the live placement with equal shares, or static expert parallelism where nothing is live.

    Parameters
    ----------
    problem : Problem
        With the live placement, if there is one.
    plan : Plan
        What comes after.
    form : {"png", "svg", "pdf"}
        Format of the picture.

    Returns
    -------
    bytes
        The picture.
    """
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure

    after = judged(problem, plan.slots_LGC, plan.share_LGC, plan.scenario_share_TLGC)
    panels = [_before(problem), (after, plain_title(plan.certificate.solver))]
    relative = [_relative(shown) for shown, _ in panels]
    # Blue is idle, white the mean, red a straggler; the few worst must not wash out the rest.
    limit = max(1.2, float(np.percentile(relative, 99.5)))
    norm = TwoSlopeNorm(vcenter=1.0, vmin=0.0, vmax=limit)
    layers, gpus = plan.time_LG.shape
    figure = Figure(figsize=(11, max(3.0, min(9.0, 1.6 + 0.11 * layers))), layout="constrained")
    for axes, values, (shown, name) in zip(figure.subplots(1, 2, sharey=True), relative, panels, strict=True):
        image = axes.imshow(values, aspect="auto", cmap="coolwarm", norm=norm, interpolation="nearest")
        ratio_L = shown.imbalance_L
        axes.set_title(f"{name}\nimbalance {ratio_L.mean():.3f} mean, {ratio_L.max():.3f} worst")
        axes.set_xlabel("GPU")
        step = max(1, layers // 12)
        axes.set_yticks(range(0, layers, step), [str(x) for x in plan.layers[::step]])
        axes.set_xticks(range(0, gpus, max(1, gpus // 8)))
    figure.axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=figure.axes, label="GPU time / mean of the layer", extend="max")
    figure.suptitle(plain_title(problem.name) or "GPU time per layer")
    return picture(figure, form, dpi=120)


def _before(problem: Problem) -> tuple[Judged, str]:
    if problem.current is not None:
        slots_LGC, title = problem.current.slots_LGC, "live placement, equal shares"
    else:
        slots_LGC, title = contiguous(problem.experts, problem.capacity_LG), "static, one replica each"
    return judged(problem, slots_LGC, equal_shares(slots_LGC, problem.experts)), title


def _relative(shown: Judged) -> FloatArray:
    """Times of the GPUs over that of a perfect balance of the layer, shape [L, G]."""
    perfect_L1, time_LG = shown.perfect_L[:, None], shown.risk_LG
    return np.asarray(np.divide(time_LG, perfect_L1, out=np.ones_like(time_LG), where=perfect_L1 > 0))
