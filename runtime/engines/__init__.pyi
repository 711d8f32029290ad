from . import attach as attach
from .observe import HiddenTap as HiddenTap
from .observe import moe_blocks as moe_blocks
from .observe import tap_hidden as tap_hidden
from .router_choice import RouterChoice as RouterChoice
from .router_choice import hooked as hooked
from .transformers import moe_parts as moe_parts
from .transformers import route as route
