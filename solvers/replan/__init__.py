"""From a live placement to a better one with as few moves as may be, and proofs of that.

May import `construct`, `pack`, `shares`, `core`, `problems`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
