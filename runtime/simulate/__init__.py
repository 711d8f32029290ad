"""Policies over traffic without a GPU: the same controller over a simulated machine.

May import `predict`, `control`, `pool`.
"""
