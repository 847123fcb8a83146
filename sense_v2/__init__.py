"""Conditional memory for any Hugging Face language model, kept in memory-mapped files."""

__version__ = "0.1.0"
