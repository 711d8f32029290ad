"""The live side: plans applied to running models, and a simulator of it.

``attach(model)`` takes over a model's experts; a `Controller` with a `Planner` keeps them balanced. The parts
are imported when they are asked for: `attach` needs torch, the package does not.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
