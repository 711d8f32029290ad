"""The loop that observes, decides and applies, over any backend.

May import `moeless_opt` (the face), `problems`, and of `solvers` only `shares`, `timed`, `migration`, `core`.
"""
