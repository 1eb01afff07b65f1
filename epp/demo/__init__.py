"""Can I see it move? Envoy, model servers, picker and load on one machine. Edge."""
