"""Which share of an expert's tokens each replica serves, for a given placement.

May import `problems` alone.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
