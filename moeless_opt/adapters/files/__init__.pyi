from .layers import model_numbers as model_numbers
from .reading import OURS as OURS
from .reading import read_map as read_map
from .reading import read_placement as read_placement
from .reading import wanted_layers as wanted_layers
from .writing import ENGINES as ENGINES
from .writing import check_name as check_name
from .writing import export as export
