"""Fine-tuning a language model into a classifier of texts.

    python -m training finetune classify --init-from models/gpt2 --input spam.tsv --out models/spam

A linear head on the last token's hidden state learns the labels, and the transformer with it, by cross-entropy with
AdamW, a linear warm-up and a linear decay. The weights that do best on the validation part are kept, measured once on
the test part, and saved. A run takes minutes, so a stopped one keeps its best weights and is not continued.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from model.checkpoint import load_model
from model.classifier import Classifier, pad
from model.classifier_config import ClassifierConfig, text_ids, without_head
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from training.batches import seed_dropout
from training.build import DTYPES, resolve_device
from training.config import TrainSection
from training.errors import DivergedError, RecipeError
from training.optim import build_optimizer, set_learning_rates
from training.out_folder import require_free
from training.schedule import lr_factor
from training.tasks.classification_batches import log_probabilities, report_on, training_batches
from training.tasks.classification_data import read_labelled, split_rows
from training.tasks.classification_metrics import ClassificationReport
from training.tasks.classification_request import Epoch, Examples, FinetuneRequest, FinetuneResult
from training.tasks.classification_save import save_result

_WARMUP = 0.06  # of the steps, as is usual for fine-tuning encoders (Liu et al. 2019, RoBERTa)
_LOG_SECONDS = 10.0
Say = Callable[[str], None]


def finetune_classifier(
    request: FinetuneRequest, say: Say, should_stop: Callable[[], bool] = lambda: False
) -> FinetuneResult | None:
    """Trains, measures and writes `request.out`, a new or empty folder. None if stopped before the first epoch's end.

    Raises RecipeError, DataError, DivergedError, or the model package's errors; nothing is written then.
    """
    started = time.monotonic()
    require_free(request.out)
    device = resolve_device(request.device)
    tokenizer = Tokenizer.load(request.init_from)
    model = load_model(request.init_from, dtype=torch.float32)
    examples, config = _prepare(request, tokenizer, model)
    for line in describe_split(examples):
        say(line)
    classifier = make_classifier(config, model, request).to(device)
    tuner = _Tuner(request, classifier, examples, say, should_stop)
    stopped = not tuner.run()
    if tuner.best is None:
        return None
    classifier.load_state_dict(tuner.best_state)
    test = None
    if examples.split.test and not stopped:
        test = tuner.measure(examples.split.test)
    result = FinetuneResult(
        examples.labels, examples.split, tuner.epochs, tuner.best, test, stopped, examples.num_cut,
        time.monotonic() - started,
    )  # fmt: skip
    save_result(request, config, tuner.best_state, tokenizer, result)
    return result


def _prepare(request: FinetuneRequest, tokenizer: Tokenizer, model: Transformer) -> tuple[Examples, ClassifierConfig]:
    base = model.config
    limit = base.max_seq_len if request.max_seq_len is None else request.max_seq_len
    if not 1 <= limit <= base.max_seq_len:
        raise RecipeError(f"--max-seq-len is {limit} but must lie between 1 and the model's context {base.max_seq_len}")
    if request.freeze_layers > base.num_layers:
        raise RecipeError(f"--freeze-layers is {request.freeze_layers} but the model has only {base.num_layers}")
    if tokenizer.vocab_size > base.vocab_size:
        raise RecipeError(f"{request.init_from} has a tokenizer of more tokens than its model; restore the right one")
    data = read_labelled(request.input, request.columns)
    split = split_rows(data, val_fraction=request.val_fraction, test_fraction=request.test_fraction, seed=request.seed)
    pad_token_id = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id
    labels = tuple(sorted(set(data.labels)))
    config = ClassifierConfig(without_head(base), labels, pad_token_id, request.max_seq_len)
    ids = text_ids(tokenizer, data.texts, pad_token_id)
    index = {label: number for number, label in enumerate(labels)}
    examples = Examples(
        labels, [row[:limit] for row in ids], [index[label] for label in data.labels], split,
        sum(len(row) > limit for row in ids),
    )  # fmt: skip
    return examples, config


def make_classifier(config: ClassifierConfig, model: Transformer, request: FinetuneRequest) -> Classifier:
    """The model's weights under a new head that the seed decides; the embedding and the first layers may be frozen."""
    classifier = Classifier(config)
    body = {name: value for name, value in model.state_dict().items() if not name.startswith("lm_head.")}
    classifier.transformer.load_state_dict(body)
    classifier.init_score(request.seed)
    if request.freeze_layers:
        frozen = [classifier.transformer.embed_tokens, *classifier.transformer.layers[: request.freeze_layers]]
        if classifier.transformer.embed_positions is not None:
            frozen.append(classifier.transformer.embed_positions)
        for module in frozen:
            module.requires_grad_(False)
    return classifier


def describe_split(examples: Examples) -> list[str]:
    """How many texts of each label every part has, and a word on labels that are far from even."""
    parts = {"train": examples.split.train, "val": examples.split.val, "test": examples.split.test}
    width = max(8, *(len(label) for label in examples.labels))
    lines = [f"{'texts':{width}} " + " ".join(f"{name:>8}" for name in parts) + f" {'share':>7}"]
    totals = [examples.targets.count(number) for number in range(len(examples.labels))]
    for number, label in enumerate(examples.labels):
        counts = [sum(examples.targets[row] == number for row in rows) for rows in parts.values()]
        share = totals[number] / len(examples.targets)
        lines.append(f"{label:{width}} " + " ".join(f"{count:8,}" for count in counts) + f" {share:7.1%}")
    if max(totals) >= 3 * min(totals):
        lines.append(
            f"the labels are uneven ({max(totals) / min(totals):.1f} to 1): judge by F1 of each label, not by accuracy "
            f"(always {examples.labels[totals.index(max(totals))]!r} would reach {max(totals) / sum(totals):.1%})"
        )
    if examples.num_cut:
        lines.append(f"{examples.num_cut:,} texts are longer than the limit and were cut at their end")
    return lines


class _Tuner:
    """The loop over epochs, and the best weights so far."""

    def __init__(
        self, request: FinetuneRequest, classifier: Classifier, examples: Examples, say: Say,
        should_stop: Callable[[], bool],
    ) -> None:  # fmt: skip
        self.request, self.classifier, self.examples = request, classifier, examples
        self.epochs: list[Epoch] = []
        self.best: Epoch | None = None
        self.best_state: dict[str, Tensor] = {}
        self._say, self._should_stop = say, should_stop
        self._dtype = DTYPES[request.dtype]
        steps = request.epochs * math.ceil(len(examples.split.train) / request.batch_size)
        self._settings = replace(
            TrainSection(), max_steps=steps, lr=request.lr, schedule="linear", min_lr_ratio=0.0, beta2=0.999,
            warmup_steps=math.ceil(_WARMUP * steps), weight_decay=request.weight_decay, seed=request.seed,
        )  # fmt: skip
        self._optimizer = build_optimizer(classifier, self._settings)
        self._step = 0

    def run(self) -> bool:
        """False when asked to stop."""
        for number in range(1, self.request.epochs + 1):
            loss = self._train_epoch(number)
            if loss is None:
                return False
            self._close_epoch(number, loss)
        return True

    def measure(self, rows: list[int]) -> ClassificationReport:
        self.classifier.eval()
        ids = [self.examples.token_ids[row] for row in rows]
        log_probs = log_probabilities(self.classifier, ids, batch_size=2 * self.request.batch_size, dtype=self._dtype)
        return report_on(self.examples.labels, log_probs, [self.examples.targets[row] for row in rows])

    def _train_epoch(self, number: int) -> float | None:
        """The mean training loss, or None when asked to stop."""
        self.classifier.train()
        train = self.examples.split.train
        lengths = [len(self.examples.token_ids[row]) for row in train]
        batches = training_batches(lengths, self.request.batch_size, self.request.seed, number)
        total, texts, told = 0.0, 0, time.monotonic()
        for count, batch in enumerate(batches, start=1):
            if self._should_stop():
                return None
            total += self._train_step([train[index] for index in batch]) * len(batch)
            texts += len(batch)
            if time.monotonic() - told >= _LOG_SECONDS:
                told = time.monotonic()
                self._say(f"epoch {number}, step {count:,} of {len(batches):,}: training loss {total / texts:.4f}")
        return total / texts

    def _train_step(self, rows: list[int]) -> float:
        device = self.classifier.device
        seed_dropout(self.request.seed, self._step, device)
        input_ids, lengths = pad([self.examples.token_ids[row] for row in rows], device)
        targets = torch.tensor([self.examples.targets[row] for row in rows], device=device)
        with torch.autocast(device.type, self._dtype, enabled=self._dtype != torch.float32):
            logits = self.classifier(input_ids, lengths)
        loss = F.cross_entropy(logits.float(), targets)
        self._optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        trained = [parameter for parameter in self.classifier.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(trained, self._settings.grad_clip)
        value = loss.item()
        if not (math.isfinite(value) and math.isfinite(norm.item())):
            raise DivergedError(f"the loss or gradient of step {self._step} is no number; try a smaller --lr")
        set_learning_rates([self._optimizer], lr_factor(self._step, self._settings))
        self._optimizer.step()
        self._step += 1
        return value

    def _close_epoch(self, number: int, loss: float) -> None:
        validation = self.measure(self.examples.split.val) if self.examples.split.val else None
        epoch = Epoch(number, self._step, loss, validation)
        self.epochs.append(epoch)
        line = f"epoch {number} of {self.request.epochs}: training loss {loss:.4f}"
        if validation is not None:
            line += (
                f", validation loss {validation.loss:.4f}, accuracy {validation.accuracy:.4f}, "
                f"macro F1 {validation.macro.f1:.4f}"
            )
        self._say(line)
        if self.best is None or _is_better(validation, self.best.validation):
            self.best = epoch
            self.best_state = {
                name: value.detach().to("cpu", copy=True) for name, value in self.classifier.state_dict().items()
            }


def _is_better(new: ClassificationReport | None, old: ClassificationReport | None) -> bool:
    """A higher macro F1, or as high and a lower loss; without validation the newer is taken."""
    if new is None or old is None:
        return True
    return (new.macro.f1, -(new.loss or 0.0)) > (old.macro.f1, -(old.loss or 0.0))
