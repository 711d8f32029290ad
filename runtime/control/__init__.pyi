from .backend import LoadWindow as LoadWindow
from .backend import MemoryReport as MemoryReport
from .backend import Observation as Observation
from .controller import Controller as Controller
from .decision import stacked as stacked
from .foreseer import Counted as Counted
from .layer_planner import LayerPlanner as LayerPlanner
from .planner import Planner as Planner
