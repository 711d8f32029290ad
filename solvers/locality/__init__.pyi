from .search import warm_locality as warm_locality
