from .compiled import Compiled as Compiled
from .compiled import compiled as compiled
from .split import DeviceSplit as DeviceSplit
from .split import Told as Told
from .split import on_device as on_device
from .split import runs_here as runs_here
from .split import upload as upload
from .split import why_not as why_not
