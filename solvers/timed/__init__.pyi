from .activation import shares_of_one as shares_of_one
from .search import timed_plan as timed_plan
from .search import timed_shares as timed_shares
from .search import warm_timed as warm_timed
