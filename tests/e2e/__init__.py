"""A real Envoy, the real picker as a process, raw model servers and clients. Nothing here is a mock."""
