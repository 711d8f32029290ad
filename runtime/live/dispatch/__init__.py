"""Which replica serves which token.

May import `live.slots` and what `live` may import.
"""
