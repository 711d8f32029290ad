"""Recordings of real loads, in the forms that engines and people write.

May import `spec` and what it may import.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
