"""Documents in JSON and NumPy files, and recorded traffic, read and written.

May import `plan`, `spec` and what they may import.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
