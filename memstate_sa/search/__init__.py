"""The read path: search now, and as of a moment."""
