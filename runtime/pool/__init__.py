"""Which replicas stay warm, and what holding them costs.

May import `problems`.
"""
