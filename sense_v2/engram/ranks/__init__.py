"""One table across several processes: ownership, collectives, liveness, commits."""
