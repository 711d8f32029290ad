"""From replica counts to slots: packing, swaps, recounts, exact patterns, and their compiled twins.

May import `core`, `problems`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
