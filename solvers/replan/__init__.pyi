from . import relabel as relabel
from .equal import warm_equal as warm_equal
from .live import live_slots as live_slots
from .relabel import seat as seat
from .solver import Replan as Replan
from .solver import frontier as frontier
from .solver import replan_within as replan_within
from .task import ReplanWish as ReplanWish
