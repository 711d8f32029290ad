from .groups import GroupWays as GroupWays
from .search import warm_locality as warm_locality
from .solver import LocalitySolver as LocalitySolver
from .solver import locality_of as locality_of
