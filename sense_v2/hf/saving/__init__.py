"""Models with memory as folders: save, convert, describe, upload."""
