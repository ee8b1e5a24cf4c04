"""Text classifiers: a linear head, without bias, on the last token's hidden state, in Hugging Face's format.

classifier = load_classifier("checkpoints/spam")
classifier(*pad([[72, 105], [79, 107, 33]]))      # logits [2, labels]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from model.checkpoint import (
    MAX_SHARD_BYTES,
    Manifest,
    Provenance,
    SavableTokenizer,
    read_state_dict,
    without_weights,
    write_checkpoint,
)
from model.classifier_config import ClassifierConfig, classifier_config_to_hf, load_classifier_config
from model.hf import SCORE, export_config, score_entry, score_to_hf, to_hf
from model.hf_config import CONFIG_FILE
from model.linear import Linear
from model.transformer import Transformer

_BODY = "transformer."


class Classifier(nn.Module):
    """Token ids to one logit for each label."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config.base)
        self.score = Linear(config.base.hidden_size, len(config.labels), False)

    def forward(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """Logits [B, labels] of input_ids [B, T], of which the first lengths [B] of each row are its text.

        What follows them has no influence: attention is causal, and each text is read off its own last token.
        """
        hidden = self.transformer(input_ids)
        rows = torch.arange(len(lengths), device=hidden.device)
        logits: Tensor = self.score(hidden[rows, lengths - 1])
        return logits

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.dtype

    def init_score(self, seed: int = 0) -> None:
        """A new head: normal, std 0.02, as transformers draws it."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.score.weight.copy_(torch.empty(self.score.weight.shape).normal_(0.0, 0.02, generator=generator))

    @torch.inference_mode()
    def probabilities(self, token_ids: Sequence[Sequence[int]]) -> Tensor:
        """Softmax of the logits, float32 [B, labels] on the CPU, of texts that fit the context; in eval mode."""
        input_ids, lengths = pad(token_ids, self.device)
        return self(input_ids, lengths).float().softmax(-1).cpu()

    def pack_for_cpu(self) -> None:
        """Lay all products out for this CPU. Afterwards the model only infers: see `Linear.pack`."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.pack()


def pad(token_ids: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """(input_ids [B, T], lengths [B]) of texts, none of them empty; which token fills up the rows does not matter."""
    rows = [torch.tensor(ids, dtype=torch.int64) for ids in token_ids]
    lengths = torch.tensor([len(row) for row in rows])
    return nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device), lengths.to(device)


def load_classifier(
    folder: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu", verify: bool = True
) -> Classifier:
    """The folder's classifier in eval mode; `dtype`, `verify` and what is raised are those of `load_model`."""
    folder = Path(folder)
    config = load_classifier_config(folder)
    score = score_entry(config.base, len(config.labels))
    state = read_state_dict(folder, config.base, dtype=dtype, verify=verify, extra=(score,))
    with without_weights():
        classifier = Classifier(config)
    own_names = {name if name == SCORE else _BODY + name: tensor.to(device) for name, tensor in state.items()}
    classifier.load_state_dict(own_names, assign=True)
    return classifier.eval()


def save_classifier(
    folder: str | Path,
    config: ClassifierConfig,
    state: Mapping[str, Tensor],
    *,
    dtype: torch.dtype,
    tokenizer: SavableTokenizer | None = None,
    provenance: Provenance | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Manifest:
    """Write a classifier's state dict as a folder that AutoModelForSequenceClassification loads.

    The folder appears whole or not at all; what is raised is what `save_state_dict` raises.
    """
    body = {name.removeprefix(_BODY): tensor for name, tensor in state.items() if name.startswith(_BODY)}
    exported = export_config(config.base)
    saved = ClassifierConfig(exported, config.labels, config.pad_token_id, config.max_text_tokens)
    config_json = classifier_config_to_hf(saved, str(dtype).removeprefix("torch."))

    def tensors() -> dict[str, Tensor]:
        score = score_to_hf(state[SCORE], dtype)
        return dict(to_hf(config.base, exported, body, dtype)) | {SCORE: score}

    return write_checkpoint(
        folder, {CONFIG_FILE: config_json}, tensors, tokenizer=tokenizer, provenance=provenance,
        max_shard_bytes=max_shard_bytes,
    )  # fmt: skip
