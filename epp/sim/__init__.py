"""What would happen if: an engine model, workloads, and in `serve/` a model server over HTTP. Pure, but for serve/."""
