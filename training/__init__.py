"""Offline training: data preparation, the trainer, evaluation. Never imports `server`."""
