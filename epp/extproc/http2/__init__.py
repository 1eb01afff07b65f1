"""HTTP/2 and gRPC as a server, without I/O: bytes and `now` in, events and bytes out."""
