from .layer import layer_of as layer_of
from .milp import write_model as write_model
