"""The read path: search in the present, and as of a moment."""
