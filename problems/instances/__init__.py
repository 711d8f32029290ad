"""The instances that ship with the package, by name, with what is known of them.

May import `io`, `plan`, `spec`.
"""
