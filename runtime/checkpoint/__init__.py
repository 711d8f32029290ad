"""Checkpoints of five architectures, read by each rank for its own experts alone.

May import nothing else of the runtime.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
