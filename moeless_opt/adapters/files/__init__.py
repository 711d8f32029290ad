"""Placements in the engines' own files, in and out: one file here per engine.

May import `moeless_opt.adapters.maps` and `problems`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
