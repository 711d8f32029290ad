"""The serving runtime: an engine with continuous batching over elastic experts, and its front.

May import anything in `runtime`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
