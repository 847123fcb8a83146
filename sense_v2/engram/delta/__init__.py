"""Changed rows as a small file, and overlays on a table that is only read."""
