"""What is given and what is wanted: topology, loads, dimensions of models, time model, placement, wishes.

May import `errors`, `arrays`, `codec`.
"""
