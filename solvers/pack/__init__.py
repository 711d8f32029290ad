"""From replica counts to slots: packing, swaps, recounts, exact patterns, and their compiled twins.

May import `core`, `problems`.
"""
