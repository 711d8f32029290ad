"""The loop that observes, decides and applies, over any backend.

May import `moeless_opt` (the face), `problems`, and of `solvers` only `shares`, `timed`, `migration`, `core`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
