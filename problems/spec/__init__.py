"""What is given and what is wanted: topology, loads, dimensions of models, time model, placement, wishes.

May import `errors`, `arrays`, `codec`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
