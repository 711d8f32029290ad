from .search import NearestTask as NearestTask
from .search import nearest_times as nearest_times
from .search import search_nearest as search_nearest
from .search import settle_nearest as settle_nearest
from .search import warm_nearest as warm_nearest
from .tiny import FEW_GPUS as FEW_GPUS
from .tiny import beam_layers as beam_layers
