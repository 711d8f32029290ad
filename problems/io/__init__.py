"""Documents in JSON and NumPy files, and recorded traffic, read and written.

May import `plan`, `spec` and what they may import.
"""
