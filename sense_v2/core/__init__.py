"""Every setting: validated once, saved beside the table."""
