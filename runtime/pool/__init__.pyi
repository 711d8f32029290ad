from .cost import RULES as RULES
from .cost import CostMeter as CostMeter
from .keep_alive import AdaptiveKeepAlive as AdaptiveKeepAlive
from .keep_alive import KeepAlive as KeepAlive
from .warm import WarmPool as WarmPool
