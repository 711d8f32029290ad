"""The instances that ship with the package, by name, with what is known of them.

May import `io`, `plan`, `spec`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
