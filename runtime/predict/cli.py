"""``moeless-forecast``: which forecast of the next window was best on a recording, and what it says.

Exit codes: 0 fine, 2 bad input, 3 a package is missing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from moeless_opt.problems.arrays import whole
from moeless_opt.problems.errors import ProblemError
from moeless_opt.problems.files import atomic_write, check_outputs, format_of
from moeless_opt.problems.io.recordings import read_loads
from moeless_opt.problems.spec import Loads
from moeless_opt.report import table
from moeless_opt.runtime.predict.backtest import NextWindow, forecast_next
from moeless_opt.signals import Signals
from moeless_opt.terminal import guarded, say

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""

    def body(signals: Signals) -> int:
        return _run(_parser().parse_args(argv))

    return guarded("moeless-forecast", body)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ProblemError("arguments", f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="moeless-forecast", description=__doc__.splitlines()[0].partition(": ")[2])
    add = parser.add_argument
    add("recording", help="loads of windows in their order, in any format that moeless-solve reads")
    add("-o", "--output", metavar="CSV", help="write the forecast, as a recording for moeless-solve")
    add("--scenarios", type=int, default=0, metavar="K", help="scenarios more: with its last K errors")
    add("--begin", type=int, default=2, metavar="N", help="windows seen before forecasts count (default 2)")
    add("--key", metavar="NAME", help="which array of a recording that has several")
    add("--experts", type=int, metavar="E", help="experts per layer, where only busy ones are listed")
    add("--as", dest="as_", choices=["counts", "trace", "physical"], help="what the recording's array is")
    add("--json", action="store_true", help="the errors, also by layer, as JSON on standard output")
    return parser


def _run(options: argparse.Namespace) -> int:
    whole("--scenarios", options.scenarios)
    whole("--begin", options.begin, low=1)
    if options.output is not None:
        format_of(options.output, [".csv"])
        check_outputs({"--output": options.output}, {"the recording": options.recording})
    asked = {name: getattr(options, name) for name in ("key", "experts", "as_")}
    loads = read_loads(
        options.recording, steps="keep", **{name: value for name, value in asked.items() if value is not None}
    )
    windows = loads.shape[0]
    if windows <= options.begin:
        raise ProblemError(
            "recording",
            f"{options.recording} has {windows} windows, a backtest with --begin {options.begin} needs at "
            f"least {options.begin + 1}",
        )
    if options.scenarios > windows - options.begin:
        raise ProblemError(
            "--scenarios",
            f"is {options.scenarios}, but only {windows - options.begin} windows were forecast before",
        )
    found = forecast_next(loads, scenarios=options.scenarios, begin=options.begin)
    if options.output is not None:
        atomic_write(options.output, _table(found.loads).encode())
    if options.json:
        print(json.dumps(_document(found), indent=1))
    else:
        cells = [[one.name, f"{one.error:.4f}", f"{one.worst:.4f}", str(one.windows)] for one in found.tried]
        print(table(["forecaster", "error", "worst window", "windows"], cells, words_last=False))
    wrote = "" if options.output is None else f"; wrote {options.output}"
    say(
        f"next window by {found.chosen.name!r}: {found.chosen.error:.2%} of the tokens went elsewhere on "
        f"average{wrote}"
    )
    return 0


def _table(loads: Loads) -> str:
    """The loads as a table that is read as a recording: each layer by the model's number, each scenario."""
    lines = ["scenario,layer,expert,count"]
    for t, load_LE in enumerate(loads.load_TLE.tolist()):
        name = "forecast" if t == 0 else f"error {t}"
        for layer, load_E in zip(loads.layers, load_LE, strict=True):
            lines += [f"{name},{layer},{expert},{load!r}" for expert, load in enumerate(load_E)]
    return "\n".join([*lines, ""])


def _document(found: NextWindow) -> dict[str, Any]:
    """The table for programs."""
    tried = [
        {
            "name": one.name,
            "error": one.error,
            "worst": one.worst,
            "windows": one.windows,
            "error_by_layer": one.error_L.tolist(),
        }
        for one in found.tried
    ]
    layers, chosen = list(found.loads.layers), found.chosen.name
    return {"format": "moeless-forecast", "version": 1, "chosen": chosen, "layers": layers, "tried": tried}


if __name__ == "__main__":
    raise SystemExit(main())
