from .control.controller import Controller as Controller
from .control.planner import Planner as Planner
from .engines.attach import attach as attach
