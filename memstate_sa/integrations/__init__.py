"""Connections of memstate_sa to frameworks for agents. Each folder needs the extra of its name."""
