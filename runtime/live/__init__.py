"""Experts of a running model: slots, dispatch, migration, faults.

May import `control`, `pool`, `checkpoint`.
"""
