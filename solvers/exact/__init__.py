"""Proven optima of single layers: patterns, CP-SAT, mixed-integer programmes.

May import `construct`, `pack`, `shares`, `core`, `problems`.
"""
