"""The tracked classes, and the projections of their rows for indexes."""
