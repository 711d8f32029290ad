"""Which share of an expert's tokens each replica serves, for a given placement.

May import `core`, `problems`.
"""
