from .run import run_parts as run_parts
from .setting import Setting as Setting
from .sheet import Line as Line
from .sheet import Sheet as Sheet
