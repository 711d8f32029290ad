from .equal import construct_equal as construct_equal
from .fractional import construct_fractional as construct_fractional
from .solver import Construct as Construct
from .solver import ConstructOptions as ConstructOptions
from .tiny import search_tiny as search_tiny
from .tiny import widths_for as widths_for
