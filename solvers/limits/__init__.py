"""Limits as the constructions and the re-planning take them: what a layer may hold, must hold, and how best.

May import `pack`, `shares`, `core`, `problems`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
