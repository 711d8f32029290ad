from . import tiny_moe_traces as tiny_moe_traces
from .library import instance_names as instance_names
from .library import instance_summary as instance_summary
from .library import load_instance as load_instance
