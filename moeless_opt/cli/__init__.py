"""The command ``moeless-solve``."""

from __future__ import annotations

from moeless_opt.cli.command import main

__all__ = ["main"]
