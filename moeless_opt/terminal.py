"""A command at a terminal: an exit code and one line for what goes wrong, and nothing that commands it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from moeless_opt.problems.errors import (
    InfeasibleError,
    InvalidPlanError,
    MoelessError,
    ProblemError,
    SolverUnavailableError,
    UnsupportedFeatureError,
)
from moeless_opt.problems.text import printable
from moeless_opt.signals import Killed, Signals

__all__ = ["fail", "guarded", "say"]


def say(text: str) -> None:
    """Tell a person, on standard error."""
    print(printable(text, keep="\n"), file=sys.stderr)


def fail(command: str, code: int, message: str) -> int:
    """Say in one line why a command fails; returns its exit code."""
    with suppress(OSError, ValueError):  # standard error may be full or closed, too
        say(f"{command}: {' '.join(message.split())}")
    return code


def guarded(command: str, body: Callable[[Signals], int]) -> int:
    """Run a command's body; returns its exit code, whatever happens that is not a fault of the program.

    Parameters
    ----------
    command : str
        Its name, for messages.
    body : callable
        Given the signals that are watched, returns the exit code.
    """
    signals = Signals()
    try:
        with signals.watch(), _plain_output():
            return body(signals)
    except Killed as signal:
        return fail(command, signal.code, f"ended by {signal}")
    except InfeasibleError as error:
        return fail(command, 1, f"infeasible: {error}")
    except InvalidPlanError as error:
        return fail(command, 1, str(error))
    except SolverUnavailableError as error:
        return fail(command, 3 if "needs a package" in str(error) else 2, str(error))
    except (ProblemError, UnsupportedFeatureError) as error:
        return fail(command, 2, str(error))
    except MoelessError as error:
        return fail(command, 1, str(error))
    except MemoryError:
        return fail(command, 2, "out of memory: the problem is too large for this machine")
    except BrokenPipeError:  # whoever read the output has seen enough
        _silence()
        return 0
    except OSError as error:
        code = fail(command, 2, f"standard output: cannot be written: {error.strerror or error}")
        _silence()
        return code


@contextmanager
def _plain_output() -> Iterator[None]:
    """While inside, standard output gets only what can be printed; at the end all of it has arrived."""
    before = sys.stdout
    if before is None:
        yield
        return
    sys.stdout = plain = _Plain(before)
    try:
        yield
        plain.finish()
    except SystemExit:  # of --help and --version
        plain.finish()
        raise
    finally:
        sys.stdout = before


class _Plain:
    """A text stream that spells out what would command a terminal, and what its encoding lacks."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._failed: OSError | None = None

    def finish(self) -> None:
        """Raise unless all that was written has arrived (argparse passes over errors)."""
        if self._failed is not None:
            raise self._failed
        self._inner.flush()

    def write(self, text: str) -> int:
        """Write a text."""
        plain = printable(text, keep="\n")
        try:
            try:
                self._inner.write(plain)
            except UnicodeEncodeError as error:
                self._inner.write(plain.encode(error.encoding, "backslashreplace").decode(error.encoding))
        except OSError as error:
            self._failed = error
            raise
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def _silence() -> None:
    """Let what is still buffered go nowhere, or Python's exit would complain of it."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            handle = os.open(os.devnull, os.O_WRONLY)
            os.dup2(handle, stream.fileno())
            os.close(handle)
