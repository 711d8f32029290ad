from .options import EngineOptions as EngineOptions
