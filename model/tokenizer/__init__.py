"""Tokenizers: text to ids and back, whole or as a stream. Free of torch."""

from model.tokenizer.stream_decoder import StreamDecoder
from model.tokenizer.tokenizer import Tokenizer

__all__ = ["StreamDecoder", "Tokenizer"]
