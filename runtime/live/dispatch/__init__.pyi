from .dispatcher import SlotDispatcher as SlotDispatcher
from .dispatcher import chosen_experts as chosen_experts
from .shares import PlannedShares as PlannedShares
from .shares import SharePolicy as SharePolicy
from .shares import share_policy as share_policy
