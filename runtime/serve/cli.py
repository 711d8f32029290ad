"""``moeless-serve``: OpenAI's API over a mixture of experts whose experts are planned while it serves.

The options are the fields of `EngineOptions`, `Planning` and `HttpOptions`. Exit codes: 0 ended as asked and
all accepted requests finished; 1 the engine failed, or requests were not finished in time; 2 bad input; 3 a
package is missing; 130 and 143 Ctrl-C and SIGTERM while it still loads its packages.
"""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, get_args, get_type_hints

from moeless_opt import __version__
from moeless_opt.problems.errors import ProblemError, SolverUnavailableError
from moeless_opt.runtime.serve import Planning
from moeless_opt.runtime.serve.engine import EngineOptions
from moeless_opt.runtime.serve.http import HttpOptions
from moeless_opt.signals import Signals
from moeless_opt.terminal import guarded, say

__all__ = ["main"]

KEYS = {"api_keys": "MOELESS_API_KEY", "admin_keys": "MOELESS_ADMIN_KEY"}
"""Where keys may come from that shall not stand on a command line; several are parted by commas."""

FLAGS = {
    "api_keys": "api-key",
    "admin_keys": "admin-key",
    "allowed_hosts": "allowed-host",
    "prefix_cache": "no-prefix-cache",
    "graphs": "no-graphs",
    "paused": "pause",
    "timeout": "rank-timeout",
}
"""Options that are not called as their field; those of lists may be given several times."""

HELP = {
    "model": "checkpoint in the form of Hugging Face; by default the small model that ships with the package",
    "name": "what clients call the model",
    "ranks": "expert-parallel processes; under torchrun, as many as it starts",
    "device": "auto, cpu or cuda",
    "dtype": "float32, bfloat16, float16 or float64; by default the checkpoint's, float32 on a CPU",
    "experts": "how experts run: auto, grouped or loop",
    "context_length": "most tokens of prompt and answer, if less than the model's own",
    "token_budget": "most tokens in a forward pass of a rank; longer prompts go in pieces",
    "max_running": "most requests in the batch of a rank",
    "max_waiting": "most requests in the queue; more get a 429",
    "block_tokens": "tokens in a block of the KV pool",
    "kv_blocks": "blocks of a rank's KV pool",
    "prefix_cache": "do not keep blocks for prompts that begin alike",
    "graphs": "on a GPU, launch decode passes one by one and not as CUDA graphs",
    "state": "keep placement and settings here; a restart begins from them",
    "timeout": "seconds without a sign of life after which a rank counts as lost",
    "max_restarts": "times in a row that a lost rank is started anew (0: never)",
    "policy": "static, eplb, moeless, windowed or per-layer",
    "paused": "plan nothing until told to (PATCH /v1/planning)",
    "every": "forward passes between two looks at the loads",
    "slots": "replicas of a layer that each rank holds; by default one more than it must",
    "max_moves": "most replicas that one plan may move",
    "max_step_bytes": "most bytes that a rank sends, or receives, at a time",
    "keep_alive": "seconds that a replica stays in memory which a layer gave up",
    "idle_after": "seconds without requests after which extra replicas leave",
    "host": "address to listen at",
    "port": "port; 0: any that is free",
    "api_keys": "key that opens /v1 (several times, or MOELESS_API_KEY)",
    "admin_keys": "key that may change plans and settings (several times, or MOELESS_ADMIN_KEY)",
    "allowed_hosts": "another name by which the server may be called (several times; *: any)",
    "max_body": "most bytes of a request's body",
    "max_choices": "most answers that one request may ask for",
    "max_connections": "most connections",
    "head_timeout": "seconds for a request's head to arrive",
    "body_timeout": "seconds for its body",
    "write_timeout": "seconds for a client to read on that reads nothing",
    "request_timeout": "seconds for a whole request",
    "idle_connection": "seconds for which an idle connection is kept",
    "drain_timeout": "seconds that accepted requests have after SIGTERM",
    "access_log": "a line for every request on standard error",
}
UNITS = {int: "N", float: "X", str: "TEXT"}
PATHS = {"model": "FOLDER", "state": "FILE"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""

    def body(_signals: Signals) -> int:
        given = vars(_parser().parse_args(argv))
        try:
            return _serve(*_read(given))
        except ProblemError as error:
            raise _by_flag(error) from None

    return guarded("moeless-serve", body)


# -------------------------------------------------------------------------------------------- options


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ProblemError("arguments", f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="moeless-serve",
        allow_abbrev=False,
        description="Serve a mixture of experts by OpenAI's API; its experts are replicated, placed and "
        "moved while it serves. The live page is at /, figures for Prometheus at /metrics.",
    )
    parser.add_argument("--version", action="version", version=f"moeless-opt {__version__}")
    kinds: tuple[Any, ...] = (EngineOptions, Planning, HttpOptions)
    for title, kind in zip(("model", "planning", "HTTP"), kinds, strict=True):
        group = parser.add_argument_group(title)
        hints = get_type_hints(kind)
        for part in fields(kind):
            if part.name != "planning":
                group.add_argument(_flag(part.name), dest=part.name, **_argument(part, hints[part.name]))
    return parser


def _flag(name: str) -> str:
    return "--" + FLAGS.get(name, name).replace("_", "-")


def _argument(part: Field[Any], hint: Any) -> dict[str, Any]:
    """What argparse is told of a field; nothing is set that is not on the command line."""
    rest: dict[str, Any] = {"default": argparse.SUPPRESS, "help": HELP[part.name]}
    if hint is bool:
        return {**rest, "action": "store_false" if part.default is True else "store_true"}
    if get_args(hint)[:1] == (str,) and get_args(hint)[-1:] == (Ellipsis,):
        return {**rest, "action": "append", "metavar": "TEXT"}
    single = next((kind for kind in (*get_args(hint), hint) if kind in UNITS), str)
    if part.default not in (None, MISSING):
        rest["help"] += f" (default {part.default})"
    return {**rest, "type": single, "metavar": PATHS.get(part.name, UNITS[single])}


def _read(given: dict[str, Any]) -> tuple[EngineOptions, HttpOptions]:
    """The options, from the command line and the environment."""

    def own(kind: Any) -> dict[str, Any]:
        return {part.name: given[part.name] for part in fields(kind) if part.name in given}

    for name, variable in KEYS.items():
        if name not in given and os.environ.get(variable):
            given[name] = [key.strip() for key in os.environ[variable].split(",") if key.strip()]
    http_options = HttpOptions(**own(HttpOptions))
    return EngineOptions(**own(EngineOptions), planning=Planning(**own(Planning))), http_options


def _by_flag(error: ProblemError) -> ProblemError:
    """What Python calls by the field is called by the option here."""
    return type(error)(_flag(error.where) if error.where in HELP else error.where, error.what)


# -------------------------------------------------------------------------------------------- serving


def _serve(engine_options: EngineOptions, http_options: HttpOptions) -> int:
    try:
        from moeless_opt.runtime.serve.engine import open_engine
        from moeless_opt.runtime.serve.http import HttpServer
    except ModuleNotFoundError as error:
        told = f"needs a package: {error.name} is not installed (pip install 'moeless-opt[runtime,serve]')"
        raise SolverUnavailableError(told) from None
    if int(os.environ.get("RANK", "0")) > 0:
        # A launcher's signals go to all ranks; these end with the first, which finishes its requests before.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    engine = open_engine(engine_options)
    if engine is None:
        return 0
    server = HttpServer(engine, http_options)
    if not http_options.is_loopback and not http_options.api_keys:
        say("moeless-serve: everybody who reaches this machine may ask and change it; --api-key limits that")

    def ready() -> None:
        say(f"moeless-serve: {engine.model} at {server.address} (live page: /, figures: /metrics)")

    return 0 if server.run(ready) else 1
