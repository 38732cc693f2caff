"""The write path: what a Session or a trigger changes reaches the log and the outbox in the same transaction."""
