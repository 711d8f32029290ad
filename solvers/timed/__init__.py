"""Plans by the time model itself: activated experts, measured curves, what is live.

May import `sizing`, `construct`, `pack`, `shares`, `core`, `problems`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
