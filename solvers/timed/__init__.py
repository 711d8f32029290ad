"""Plans by the time model itself: activated experts, measured curves, what is live.

May import `sizing`, `construct`, `pack`, `shares`, `core`, `problems`.
"""
