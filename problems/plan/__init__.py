"""What a plan is and what it is worth: evaluation, bounds, migration, objective, the independent verifier.

May import `spec` and what it may import.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
