"""Every command's options and help; importing these loads no model library."""
