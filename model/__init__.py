"""Decoder-only language models: configuration, weights, tokenizers, sampling and the naive `generate()`.

Importing this package imports nothing heavy: `config`, `sampling_params`, `tokenizer` and `chat_template`
stay free of torch, so that the server's API process can use them.
"""
