"""Embedding models behind one contract: `base.Backend`. Imports neither a web framework nor the server."""
