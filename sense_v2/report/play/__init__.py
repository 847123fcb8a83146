"""The page of `sense-engram play`: what it shows, and the server that shows it."""
