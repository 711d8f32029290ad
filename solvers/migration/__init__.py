"""In which order and over which links the replicas of a plan move.

May import `core`, `problems`.
"""
