"""How many replicas there are to be: under limits, a coefficient of variation, a target, a budget.

May import `replan`, `limits`, `construct`, `pack`, `shares`, `core`, `problems`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
