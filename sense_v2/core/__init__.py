"""Settings, validated once and saved beside the table; errors, folders, progress."""
