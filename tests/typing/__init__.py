"""Lines that type checkers accept or reject. `make lint` checks them with mypy and pyright; nothing runs them.

In rejected.py each line ignores the error that it must have. A line without that error is an error of its own: an
unused ignore comment.
"""
