"""Placements for engines whose source GPUs send to the nearest replica: one local search, compiled or not.

May import `limits`, `pack`, `shares`, `core`, `problems`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
