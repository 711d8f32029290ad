"""What engines speak: their maps of experts to slots, their files, their plug-ins; none need be installed.

May import the face, `problems` and `solvers`; neither torch nor an engine before it is asked for.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
