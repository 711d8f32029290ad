from .files import ENGINES as ENGINES
from .files import export as export
from .files import read_map as read_map
from .files import read_placement as read_placement
from .maps import EngineMap as EngineMap
from .maps import expert_slots as expert_slots
from .maps import map_of_slots as map_of_slots
from .maps import slots_of_map as slots_of_map
