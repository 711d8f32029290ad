from .dispatcher import SlotDispatcher as SlotDispatcher
from .dispatcher import chosen_experts as chosen_experts
from .shares import BalancedShares as BalancedShares
from .shares import EqualShares as EqualShares
from .shares import PlannedShares as PlannedShares
from .shares import SharePolicy as SharePolicy
from .shares import share_policy as share_policy
from .stopwatch import Stopwatch as Stopwatch
