"""Bytes on disk: format, row types, checksums, files and locks, opening, journal."""
