from .equal import construct_equal as construct_equal
from .fractional import construct_fractional as construct_fractional
from .solver import Construct as Construct
from .solver import ConstructOptions as ConstructOptions
