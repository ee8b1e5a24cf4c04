"""Loss, perplexity and bits per byte of a model over a whole split or text, in the windows of `model.evaluation`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.checkpoint import load_model
from model.evaluation import Evaluation, Window, prediction_windows
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from training.build import resolve_device
from training.data.dataset import open_folder
from training.data.examples import ExampleSplit
from training.distributed import Distributed
from training.errors import DataError, RecipeError
from training.evaluation.progress import OnProgress, silent
from training.evaluation.text import encode_files
from training.loss import summed_cross_entropy


class Tokens(Protocol):
    """A run of tokens that stands for `num_bytes` bytes of text."""

    @property
    def num_tokens(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    def read(self, start: int, length: int) -> npt.NDArray[np.int64]: ...


@torch.no_grad()
def evaluate_loss(
    model: Transformer,
    tokens: Tokens,
    *,
    seq_len: int,
    stride: int | None = None,
    batch_size: int = 16,
    max_tokens: int = 0,
    autocast: torch.dtype | None = None,
    on_progress: OnProgress = silent,
) -> Evaluation:
    """One deterministic pass; the model's mode is restored. `max_tokens` > 0 stops after that many predictions.

    `autocast` computes products in that type. Raises DataError when there are fewer than two tokens.
    """
    precision = torch.autocast(model.device.type, autocast) if autocast else contextlib.nullcontext()

    def summed_loss(inputs: Tensor, targets: Tensor, skip: int) -> Tensor:
        with precision:
            return summed_cross_entropy(
                model.compute_logits, model(inputs)[:, skip:], targets[:, skip:], vocab_size=model.config.vocab_size
            )

    was_training = model.training
    model.eval()
    result = evaluate_windows(
        summed_loss, tokens, Distributed(model.device), seq_len=seq_len, stride=stride, batch_size=batch_size,
        max_tokens=max_tokens, on_progress=on_progress,
    )  # fmt: skip
    model.train(was_training)
    return result


def evaluate_windows(
    summed_loss: Callable[[Tensor, Tensor, int], Tensor],
    tokens: Tokens,
    distributed: Distributed,
    *,
    seq_len: int,
    stride: int | None = None,
    batch_size: int = 16,
    max_tokens: int = 0,
    on_progress: OnProgress = silent,
) -> Evaluation:
    """The mean of `summed_loss(inputs, targets, skip)` over all windows, which the ranks share out. Collective.

    All ranks call the function equally often, as FSDP demands: what the last round has too few batches for is
    computed and not counted. Raises DataError when there are fewer than two tokens.
    """
    predictions = tokens.num_tokens - 1
    if predictions < 1:
        raise DataError("the text has fewer than two tokens; there is nothing to predict")
    counted = min(predictions, max_tokens) if max_tokens else predictions
    batches = _batches(prediction_windows(counted, seq_len, stride or seq_len), batch_size)
    total = torch.zeros((), dtype=torch.float64, device=distributed.device)
    done = 0
    while batches_of_round := list(islice(batches, distributed.world_size)):
        is_mine = distributed.rank < len(batches_of_round)
        batch = batches_of_round[distributed.rank if is_mine else 0]
        block = torch.from_numpy(np.stack([tokens.read(w.start, w.length + 1) for w in batch])).to(distributed.device)
        loss = summed_loss(block[:, :-1], block[:, 1:], batch[0].skip)
        if is_mine:
            total += loss
        done += sum(window.length - window.skip for each in batches_of_round for window in each)
        on_progress("predicting tokens", done, counted)
    return Evaluation(distributed.sum(total).item() / counted, counted, tokens.num_bytes / tokens.num_tokens)


def evaluate_checkpoint(
    folder: Path,
    *,
    data: Path | None = None,
    split: str = "val",
    text: Path | Sequence[Path] | None = None,
    seq_len: int | None = None,
    stride: int | None = None,
    batch_size: int = 16,
    device: str = "auto",
    dtype: torch.dtype = torch.float32,
) -> Evaluation:
    """A saved checkpoint on a prepared split or on text files. `seq_len` None is the model's context.

    Raises RecipeError, DataError, CheckpointError or TokenizerError.
    """
    checkpoint = open_checkpoint(folder, device=device, dtype=dtype)
    source = TextSource(data, split, (text,) if isinstance(text, Path) else tuple(text or ()))
    return checkpoint.evaluate(source, seq_len=seq_len, stride=stride, batch_size=batch_size)


@dataclass(frozen=True, slots=True)
class TextSource:
    """What is read: the split of a prepared folder or of raw token files, or text files one behind the other.

    `text_keys` are the fields of a row that hold text, in files of rows.
    """

    data: Path | None = None
    split: str = "val"
    texts: Sequence[Path] = ()
    text_keys: Sequence[str] = ("text",)


@dataclass(frozen=True, slots=True)
class LoadedCheckpoint:
    """A saved model in eval mode and its tokenizer."""

    folder: Path
    model: Transformer
    tokenizer: Tokenizer

    def evaluate(
        self,
        source: TextSource,
        *,
        seq_len: int | None = None,
        stride: int | None = None,
        batch_size: int = 16,
        on_progress: OnProgress = silent,
    ) -> Evaluation:
        """`seq_len` None is the model's context. Of prepared examples the answers alone count, each by itself.

        Raises RecipeError for sizes that do not fit, and as `tokens` does.
        """
        context = self.model.config.max_seq_len
        seq_len = context if seq_len is None else seq_len
        if not 1 <= seq_len <= context:
            raise RecipeError(f"--seq-len is {seq_len} but the model's context is {context}")
        if stride is not None and not 1 <= stride <= seq_len:
            raise RecipeError(f"--stride is {stride} but must lie between 1 and {seq_len}")
        tokens = self.tokens(source, on_progress)
        if isinstance(tokens, ExampleSplit):
            if stride is not None:
                raise RecipeError("--stride is for texts, but the data are examples, each read whole; leave it out")
            from training.evaluate_examples import evaluate_answers  # which needs this module

            return evaluate_answers(self.model, tokens, seq_len=seq_len, batch_size=batch_size)
        return evaluate_loss(
            self.model, tokens, seq_len=seq_len, stride=stride, batch_size=batch_size, on_progress=on_progress
        )

    def tokens(self, source: TextSource, on_progress: OnProgress = silent) -> Tokens:
        """Raises DataError for text or data that cannot be used, RecipeError unless one of both is named."""
        if (source.data is None) == (not source.texts):
            raise RecipeError("give either --data or --text")
        if source.data is None:
            return encode_files(source.texts, self.tokenizer, on_progress, text_keys=source.text_keys)
        folder = str(self.folder.resolve())  # raw files do not say what they were encoded with
        opened = open_folder(source.data, tokenizer=folder)
        if opened.tokenizer.digest != self.tokenizer.digest:
            raise DataError(
                f"{source.data}: prepared with another tokenizer than {self.folder} uses; prepare it with this one"
            )
        return opened.open_split(source.split, verify=True)


def open_checkpoint(folder: Path, *, device: str = "auto", dtype: torch.dtype = torch.float32) -> LoadedCheckpoint:
    """Raises RecipeError for the device, ConfigError, CheckpointError or TokenizerError for the folder."""
    model = load_model(folder, dtype=dtype, device=resolve_device(device))
    return LoadedCheckpoint(folder, model, Tokenizer.load(folder))


def _batches(windows: Iterator[Window], size: int) -> Iterator[list[Window]]:
    """Groups of at most `size` neighbours of one shape."""
    group: list[Window] = []
    for window in windows:
        if group and (len(group) == size or (window.length, window.skip) != (group[0].length, group[0].skip)):
            yield group
            group = []
        group.append(window)
    if group:
        yield group
