"""Integrations with agent frameworks. Each folder needs the extra with the same name."""
