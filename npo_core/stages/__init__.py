"""What a notebook or the command line calls."""
