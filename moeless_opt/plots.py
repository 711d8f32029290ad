"""Pictures of plans."""

from __future__ import annotations

import io
from importlib.util import find_spec

import numpy as np

from moeless_opt.problems.arrays import FloatArray
from moeless_opt.problems.errors import SolverUnavailableError
from moeless_opt.problems.plan import Plan, gpu_times, imbalance
from moeless_opt.problems.spec import Problem, equal_shares

__all__ = ["need_matplotlib", "plot_loads"]


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


def plot_loads(problem: Problem, plan: Plan) -> bytes:
    """Draw each GPU's time in every layer as a heat map, before and after, on one scale.

    Before is the live placement with equal shares, or static expert parallelism where nothing is live.

    Returns
    -------
    bytes
        A PNG.
    """
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure

    before_LG, title = _before(problem)
    speed_G = problem.topology.speed_G
    panels = [(before_LG, title), (plan.time_LG, f"{plan.certificate.solver}")]
    relative = [_relative(time_LG, speed_G) for time_LG, _ in panels]
    # Blue is idle, white the mean, red a straggler; the few worst must not wash out the rest.
    limit = max(1.2, float(np.percentile(relative, 99.5)))
    norm = TwoSlopeNorm(vcenter=1.0, vmin=0.0, vmax=limit)
    layers, gpus = plan.time_LG.shape
    figure = Figure(figsize=(11, max(3.0, min(9.0, 1.6 + 0.11 * layers))), layout="constrained")
    for axes, values, (time_LG, name) in zip(
        figure.subplots(1, 2, sharey=True), relative, panels, strict=True
    ):
        image = axes.imshow(values, aspect="auto", cmap="coolwarm", norm=norm, interpolation="nearest")
        ratio_L = imbalance(time_LG, speed_G)
        axes.set_title(f"{name}\nimbalance {ratio_L.mean():.3f} mean, {ratio_L.max():.3f} worst")
        axes.set_xlabel("GPU")
        step = max(1, layers // 12)
        axes.set_yticks(range(0, layers, step), [str(x) for x in plan.layers[::step]])
        axes.set_xticks(range(0, gpus, max(1, gpus // 8)))
    figure.axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=figure.axes, label="GPU time / mean of the layer", extend="max")
    figure.suptitle(problem.name or "GPU time per layer")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _before(problem: Problem) -> tuple[FloatArray, str]:
    if problem.current is not None:
        slots_LGC, title = problem.current.slots_LGC, "live placement, equal shares"
    else:
        from moeless_opt.problems.spec import contiguous

        slots_LGC, title = contiguous(problem.experts, problem.capacity_LG), "static, one replica each"
    share_LGC = equal_shares(slots_LGC, problem.experts)
    return gpu_times(problem.load_LE, slots_LGC, share_LGC, problem.topology.speed_G, problem.time), title


def _relative(time_LG: FloatArray, speed_G: FloatArray) -> FloatArray:
    mean_L = time_LG @ (speed_G / speed_G.sum())
    return np.asarray(
        np.divide(time_LG, mean_L[:, None], out=np.ones_like(time_LG), where=mean_L[:, None] > 0)
    )
