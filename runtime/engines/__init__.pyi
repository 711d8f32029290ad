from . import attach as attach
from .observe import HiddenTap as HiddenTap
from .observe import moe_blocks as moe_blocks
from .observe import tap_hidden as tap_hidden
from .transformers import moe_parts as moe_parts
from .transformers import route as route
