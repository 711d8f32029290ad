"""From a live placement to a better one with as few moves as may be, and proofs of that.

May import `construct`, `pack`, `shares`, `core`, `problems`.
"""
