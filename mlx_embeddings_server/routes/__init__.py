"""One file a public API. Handlers translate; the service decides."""
