"""What every solver shares: the contract, features, stopping, results, linear programmes, knapsack.

May import `shares`, `problems`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
