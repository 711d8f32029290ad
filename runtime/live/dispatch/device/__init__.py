"""The token split on the device: counts to shares to quotas to routes, without the host.

May import `live.dispatch`'s tables and policies. `_kernels` imports Triton: only when it is wanted.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
