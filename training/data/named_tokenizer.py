"""A tokenizer by the name that a recipe or a command line gives it. Free of torch."""

from __future__ import annotations

from pathlib import Path

from model.tokenizer import Tokenizer
from training.errors import RecipeError


def named_tokenizer(name: str, option: str) -> Tokenizer:
    """`gpt2`, `bytes`, or a tokenizer.json or a folder that holds one. `option` is what the user wrote it behind.

    Raises RecipeError for a name that is none of these, TokenizerError for a file that cannot be used.
    """
    if name == "gpt2":
        return Tokenizer.gpt2()
    if name == "bytes":
        return Tokenizer.bytes()
    path = Path(name)
    if not path.exists():
        raise RecipeError(f"{option} {name}: neither gpt2 or bytes nor an existing tokenizer.json or its folder")
    return Tokenizer.load(path) if path.is_dir() else Tokenizer.from_file(path)
