"""A model server over HTTP: the simulated engine in real time behind vLLM's API. Edge."""

from epp.sim.serve.server import ModelServer, run_model_servers, serve_model

__all__ = ["ModelServer", "run_model_servers", "serve_model"]
