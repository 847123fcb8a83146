"""The command `sense-engram`: options, one call of the library, and what is printed."""
