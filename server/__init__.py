"""The HTTP server and its continuous-batching engine."""
