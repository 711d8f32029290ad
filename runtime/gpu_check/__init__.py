"""``python -m moeless_opt.runtime.gpu_check``: what the runtime claims of GPUs, proved and measured on one.

Every part is a module with a `TITLE`, the names of its `LINES`, the `SECONDS` that it may take, and
``check(setting, sheet)``. Parts run in processes of their own: one that fails or hangs spoils no other.

May import every other room.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
