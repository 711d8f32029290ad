"""Proven optima of single layers: patterns, CP-SAT, mixed-integer programmes.

May import `construct`, `pack`, `shares`, `core`, `problems`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
