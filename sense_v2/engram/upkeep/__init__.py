"""Work on whole tables: check, copy, convert, transfer, hot rows, usage."""
