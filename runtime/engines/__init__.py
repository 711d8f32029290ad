"""Taking over the experts of a model: megatron-core, transformers.

May import `live` and what it may import.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
