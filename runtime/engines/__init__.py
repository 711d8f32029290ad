"""Taking over the experts of a model: megatron-core, transformers.

May import `live` and what it may import.
"""
