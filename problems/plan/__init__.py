"""What a plan is and what it is worth: evaluation, bounds, migration, objective, the independent verifier.

May import `spec` and what it may import.
"""
