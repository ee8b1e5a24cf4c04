"""The engine: token ids in, token ids out. Nothing here imports FastAPI, pydantic or the settings."""
