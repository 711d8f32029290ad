"""What the next loads will be: history, affinity, gates ahead of time.

May import `engines`, `live` and what they may import.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
