from .read import read_loads as read_loads
