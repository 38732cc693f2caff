"""SQLite as memstate_sa needs it: `configure` prepares an engine that the application makes itself."""

from memstate_sa.db.sqlite import SavepointWarning, configure

__all__ = ["SavepointWarning", "configure"]
