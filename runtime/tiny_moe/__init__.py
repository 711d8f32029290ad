"""A small mixture of experts of our own: model, corpus, training, recordings, scores.

May import anything in `runtime`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
