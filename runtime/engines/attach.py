"""``attach(model)``: finds the engine that a model is of, and takes its experts over."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from dataclasses import fields
from importlib.metadata import entry_points
from typing import Any

from moeless_opt.problems.errors import ProblemError, UnsupportedFeatureError
from moeless_opt.runtime.live import AttachOptions, Engine, LiveModel, RankLostError

__all__ = ["attach"]

#: Adapters of this package, asked in this order after those of others. One line each.
BUILT_IN = ("transformers", "megatron")
#: Group under which other packages name their adapters.
ENTRY_POINTS = "moeless_opt.engines"


def attach(model: Any, **options: Any) -> LiveModel:
    """Take over the experts of a running model.

    Parameters
    ----------
    model : GPTModel, transformers model, or another engine's
        Unmodified, in evaluation mode, with its weights loaded. Every rank of each expert-parallel group
        calls this at the same time.
    **options
        See `AttachOptions`.

    Returns
    -------
    LiveModel

    Raises
    ------
    UnsupportedFeatureError
        Naming what the model uses and this does not support.
    """
    known = [f.name for f in fields(AttachOptions) if f.init]
    for name in options:
        if name not in known:
            raise ProblemError(name, f"is no option of attach; there are {', '.join(known)}")
    asked: list[str] = []
    missing: list[str] = []
    for name, engine in _engines(missing):
        if engine.accepts(model):
            return _attached(engine, model, AttachOptions(**options))
        asked.append(name)
    because = f"; not available: {'; '.join(missing)}" if missing else ""
    raise UnsupportedFeatureError(
        f"{type(model).__name__} is no model with experts of {', '.join(asked) or 'any engine'}{because}"
    )


def _attached(engine: Engine, model: Any, options: AttachOptions) -> LiveModel:
    """Take the experts over, on all ranks or on none; who cannot tells the others why."""
    try:
        adopted = engine.adopt(model, options)
        live = LiveModel(adopted, options)
        adopted.install(live.dispatchers, live.row_block.most)
        return live
    except RankLostError as error:
        hearts = [group.heart for group in options.made if group.heart is not None]
        heard = "; ".join(news for heart in hearts if (news := heart.heard()))
        for group in options.made:
            group.close()
        raise RankLostError(f"attach has failed on another rank: {heard or error}") from error
    except BaseException as error:
        for group in options.made:
            group.close(f"{type(error).__name__}: {error}")
        raise


def _engines(missing: list[str]) -> Iterator[tuple[str, Engine]]:
    """Adapters by name, imported as they are asked; what cannot be imported is added to `missing`."""
    for entry in sorted(entry_points(group=ENTRY_POINTS), key=lambda entry: entry.name):
        try:
            engine = entry.load()
            for part in ("accepts", "adopt"):
                if not callable(getattr(engine, part, None)):
                    raise TypeError(f"it has no {part}()")
        except Exception as error:  # whatever is wrong with it, other engines still work
            text = f"engine {entry.name!r} ({entry.value}): {type(error).__name__}: {error}"
            warnings.warn(f"left out {text}", RuntimeWarning, stacklevel=3)
            missing.append(text)
        else:
            yield entry.name, engine
    for name in BUILT_IN:
        try:
            module: Any = importlib.import_module(f"moeless_opt.runtime.engines.{name}")
        except ImportError as error:
            missing.append(f"{name} ({error})")
        else:
            yield name, module
