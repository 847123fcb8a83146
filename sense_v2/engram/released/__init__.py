"""Tables that others released: read in place, imported, exported."""
