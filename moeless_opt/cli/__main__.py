"""``python -m moeless_opt.cli`` is ``moeless-solve``."""

from __future__ import annotations

import sys

from moeless_opt.cli.command import main

if __name__ == "__main__":
    sys.exit(main())
