"""What the next loads will be: history, affinity, gates ahead of time.

May import `engines`, `live` and what they may import.
"""
