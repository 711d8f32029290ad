"""Which replica serves which token.

May import `live.slots` and what `live` may import.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
