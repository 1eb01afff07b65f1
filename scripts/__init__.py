"""Checks and generators of the repository; `make check` and `make protos` run them."""
