"""Which servers are there, as Kubernetes says: objects of its API become endpoints and policies."""
