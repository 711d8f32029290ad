"""Checkpoints of five architectures, read by each rank for its own experts alone.

May import nothing else of the runtime.
"""
