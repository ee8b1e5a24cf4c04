"""Training tokenizers, comparing them on a text, and showing what one does to a text. Free of torch."""
