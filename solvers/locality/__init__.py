"""Placements that keep tokens near: traffic between GPUs, groups kept on a node, affinity between layers.

May import `lexicographic`, `replan`, `construct`, `limits`, `pack`, `shares`, `core`, `problems`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
