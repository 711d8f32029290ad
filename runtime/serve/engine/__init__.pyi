from .fleet import Fleet as Fleet
from .fleet import open_engine as open_engine
from .options import EngineOptions as EngineOptions
