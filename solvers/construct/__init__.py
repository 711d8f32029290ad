"""A placement from nothing: equal split, fractional split, small layers.

May import `pack`, `shares`, `core`, `problems`.
"""
