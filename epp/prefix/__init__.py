"""Who already holds a prompt's prefix? Block hashes and the approximate index. Pure."""
