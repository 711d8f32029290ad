"""Experts of a running model: slots, dispatch, migration, faults.

May import `control`, `pool`, `checkpoint`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
