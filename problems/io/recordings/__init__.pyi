from .folders import is_many as is_many
from .read import frame_loads as frame_loads
from .read import read_loads as read_loads
from .sources import read_sources as read_sources
