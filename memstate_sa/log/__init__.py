"""The log, the outbox, and positions in them."""
