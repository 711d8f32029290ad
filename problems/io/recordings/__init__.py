"""Recordings of real loads, in the forms that engines and people write.

May import `spec` and what it may import.
"""
