"""Undo of transactions."""
