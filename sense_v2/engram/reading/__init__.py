"""Rows out of the files: warm gathers, cold batches, prefetch, budgets, devices."""
