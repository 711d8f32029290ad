from .foresight import tiny_moe_predictions_file as tiny_moe_predictions_file
from .policies import Policy as Policy
from .policies import policy_names as policy_names
from .run import Simulation as Simulation
from .run import simulate as simulate
from .scenario import Scenario as Scenario
from .shares import BalancedRule as BalancedRule
