"""Other people's balancers, as published: static, EPLB, MoEless.

May import `pack`, `shares`, `core`, `problems`.
"""
