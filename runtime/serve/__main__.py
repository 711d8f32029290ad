"""``python -m moeless_opt.runtime.serve``: the same as ``moeless-serve``, for launchers such as torchrun."""

from __future__ import annotations

import sys

from moeless_opt.runtime.serve.cli import main

if __name__ == "__main__":
    sys.exit(main())
