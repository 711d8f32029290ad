from .budget import Redundancy as Redundancy
from .budget import redundancy_rows as redundancy_rows
from .limits import count_replicas as count_replicas
from .minimal import fewest_for_time as fewest_for_time
