"""How many replicas there are to be: under limits, a coefficient of variation, a target, a budget.

May import `construct`, `pack`, `shares`, `core`, `problems`.
"""
