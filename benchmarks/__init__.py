"""Measurements of the public interfaces: the engine alone, the server over HTTP, and other projects beside them."""
