"""A placement from nothing: equal split, fractional split, small layers.

May import `pack`, `shares`, `core`, `problems`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
