"""Which servers are there? Endpoints from a file. Edge."""
