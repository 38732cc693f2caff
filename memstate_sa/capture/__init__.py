"""The write path: each change by a Session or a trigger reaches log and outbox in the same transaction."""
