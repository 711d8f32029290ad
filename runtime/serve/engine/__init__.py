"""The engine: paged KV pool, batches, sampling, ranks, checkpoints, and the controller under traffic.

May import anything in `runtime` but `serve.http`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
