from .best import best_shares as best_shares
from .flow import descend as descend
from .flow import solve_shares as solve_shares
from .graph import ReplicaGraph as ReplicaGraph
from .rounding import round_tokens as round_tokens
from .source import pooled_shares as pooled_shares
from .source import solve_source_shares as solve_source_shares
