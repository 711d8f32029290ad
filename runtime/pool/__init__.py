"""Which replicas stay warm, and what holding them costs.

May import `problems`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
