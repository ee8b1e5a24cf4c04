"""The classifier's folder: what `save_classifier` writes, and classification.json with how it was made and measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model.classifier import save_classifier
from model.classifier_config import ClassifierConfig
from model.manifest import Provenance, file_sha256
from model.tokenizer import Tokenizer
from training.tasks.classification_request import FinetuneRequest, FinetuneResult

REPORT_FILE = "classification.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"


def save_result(
    request: FinetuneRequest,
    config: ClassifierConfig,
    state: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    result: FinetuneResult,
) -> None:
    """Write `request.out` whole or not at all. Raises CheckpointError or ConfigError."""
    companions = _Companions(tokenizer, config.pad_token_id, describe(request, result))
    provenance = Provenance(step=result.best.step, data=f"sha256:{file_sha256(request.input)}")
    save_classifier(request.out, config, state, dtype=torch.float32, tokenizer=companions, provenance=provenance)


def describe(request: FinetuneRequest, result: FinetuneResult) -> dict[str, object]:
    """Labels, settings and measurements as plain values, without anything of this machine."""
    validation = result.best.validation
    return {
        "labels": list(result.labels),
        "texts": {"train": len(result.split.train), "val": len(result.split.val), "test": len(result.split.test)},
        "texts_cut": result.num_cut,
        "settings": {
            name: getattr(request, name)
            for name in (
                "epochs", "lr", "batch_size", "weight_decay", "val_fraction", "test_fraction", "seed", "max_seq_len",
                "freeze_layers", "dtype",
            )
        },
        "best_epoch": result.best.number,
        "steps": result.best.step,
        "stopped": result.stopped,
        "epochs": [
            {
                "epoch": each.number,
                "train_loss": each.train_loss,
                "val_loss": None if each.validation is None else each.validation.loss,
                "val_accuracy": None if each.validation is None else each.validation.accuracy,
                "val_macro_f1": None if each.validation is None else each.validation.macro.f1,
            }
            for each in result.epochs
        ],
        "validation": None if validation is None else validation.describe(),
        "test": None if result.test is None else result.test.describe(),
    }  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Companions:
    """What lies beside the weights, in the form in which `save_classifier` takes a tokenizer."""

    tokenizer: Tokenizer
    pad_token_id: int | None
    report: dict[str, object]

    def save(self, folder: Path) -> None:
        self.tokenizer.save(folder)
        self._name_padding(folder / _TOKENIZER_CONFIG)
        (folder / REPORT_FILE).write_text(json.dumps(self.report, indent=2, ensure_ascii=False) + "\n", "utf-8")

    def _name_padding(self, path: Path) -> None:
        """transformers' tokenizer pads batches with the token that the model expects there."""
        token = next((text for text, i in self.tokenizer.special_tokens.items() if i == self.pad_token_id), None)
        if token is not None:
            values = json.loads(path.read_bytes()) if path.is_file() else {}
            path.write_text(json.dumps(values | {"pad_token": token}, indent=2, ensure_ascii=False) + "\n", "utf-8")
