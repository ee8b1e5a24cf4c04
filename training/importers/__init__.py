"""Checkpoints of other trainers as Hugging Face folders: a module per format, and `convert` over them."""
