"""What `prepare` is asked for. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from model.controls import Controls, check_name, read_controls
from training.data.readers import Documents
from training.data.splits import Shares, SplitRule
from training.errors import RecipeError


@dataclass(frozen=True, slots=True)
class PrepareRequest:
    """What `prepare` is asked for. `digests` are the sha256 of the URLs among `inputs`, in their order.

    `documents` divides plain text; rows of other files are documents of their own, whose text the fields `text_keys`
    hold. `split` "auto" is "tail" for plain text that is read as whole files, otherwise "documents" (see
    `training.data.splits`). `workers` 0 is one process per core where that pays.

    The fields `control_keys` of a row become control tokens before its text, in this order; every value found is
    added to the tokenizer (see `model.controls`). `special_tokens` and `text_tokens` are added too.
    """

    inputs: tuple[str, ...]
    out: Path
    tokenizer: str = "gpt2"
    val_fraction: float = 0.1
    test_fraction: float = 0.0
    digests: tuple[str, ...] = ()
    workers: int = 0
    force: bool = False
    documents: Documents = "file"
    split: SplitRule = "auto"
    text_keys: tuple[str, ...] = ("text",)
    control_keys: tuple[str, ...] = ()
    special_tokens: tuple[str, ...] = ()
    text_tokens: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0.0 < self.val_fraction < 1.0:
            raise RecipeError(f"--val-fraction is {self.val_fraction} but must lie between 0 and 1")
        if not 0.0 <= self.test_fraction < 1.0 - self.val_fraction:
            raise RecipeError(f"--test-fraction is {self.test_fraction} but must leave text beside --val-fraction")
        if self.workers < 0:
            raise RecipeError(f"--workers is {self.workers} but must be at least 0")
        if not self.text_keys or not all(self.text_keys):
            raise RecipeError("--text-key is empty; name the field that holds the text")
        for name in self.control_keys:
            check_name(name)
            if self.control_keys.count(name) > 1:
                raise RecipeError(f"--control {name} is given twice; name each control once")
        if not all((*self.special_tokens, *self.text_tokens)):
            raise RecipeError("--add-token or --add-special-token is empty; give the token's text")

    @property
    def shares(self) -> Shares:
        return Shares(self.val_fraction, self.test_fraction)

    @property
    def extends(self) -> bool:
        """Whether the tokenizer gets tokens more."""
        return bool(self.control_keys or self.special_tokens or self.text_tokens)

    @property
    def known_controls(self) -> Controls:
        """Of the tokenizer that is named."""
        path = Path(self.tokenizer)
        return read_controls(path if path.is_dir() else path.parent) if path.exists() else Controls()

    @property
    def ordered_control_keys(self) -> tuple[str, ...]:
        """As they stand before a text: those that the tokenizer knows come first, in its order."""
        declared = self.known_controls.with_labels(self.control_keys, ()).values
        return tuple(name for name in declared if name in self.control_keys)
