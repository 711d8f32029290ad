"""Policies over traffic without a GPU: the same controller over a simulated machine.

``simulate(Scenario(...))`` compares policies; `drive.drive` gives a `SimulatedBackend` traffic of one's own.

May import `predict`, `control`, `pool`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
