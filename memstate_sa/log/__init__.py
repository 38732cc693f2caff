"""What happened: the log, the outbox, and positions in them."""
