"""A real vLLM behind a real Envoy and the picker; run by `make test-vllm`, left out where EPP_VLLM is not set."""
