"""What a text classifier is: a transformer, its labels, and how texts become its input. Free of torch.

The folder is that of Hugging Face's …ForSequenceClassification classes: config.json names one of them in
`architectures`, the labels in `id2label`, and in `pad_token_id` the token that fills up the shorter texts of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from model.config import ModelConfig
from model.errors import ConfigError, TokenizerError
from model.hf_config import (
    CLASSIFIER_CLASSES,
    CONFIG_FILE,
    MODEL_CLASSES,
    config_from_hf,
    config_to_hf,
)
from model.json_file import JsonFields, read_json_object
from model.tokenizer import Tokenizer

MAX_LABELS = 4_096
_CLASS_NAMES = {architecture: name for name, architecture in CLASSIFIER_CLASSES.items()}
_LANGUAGE_MODELS = {architecture: name for name, architecture in MODEL_CLASSES.items()}
_PROBLEM = "single_label_classification"
_MAX_TEXT_TOKENS = "max_text_tokens"  # a field of our own, which transformers keeps and does not read


@dataclass(frozen=True, slots=True)
class ClassifierConfig:
    """`base` is the transformer, whose language head is not there; `labels` are in the order of the logits.

    `max_text_tokens` is the longest text that training has seen, at most the context, which None stands for.
    Raises ConfigError, naming the field, for what cannot be run.
    """

    base: ModelConfig
    labels: tuple[str, ...]
    pad_token_id: int | None = None
    max_text_tokens: int | None = None

    def __post_init__(self) -> None:
        if not 2 <= len(self.labels) <= MAX_LABELS:
            raise ConfigError(f"labels must number 2 to {MAX_LABELS}, not {len(self.labels)}")
        if not all(self.labels) or len(set(self.labels)) != len(self.labels):
            raise ConfigError("labels must be different and none of them empty")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.base.vocab_size:
            raise ConfigError("pad_token_id must be a token of the vocabulary or null")
        if self.max_text_tokens is not None and not 1 <= self.max_text_tokens <= self.base.max_seq_len:
            raise ConfigError(f"max_text_tokens must lie between 1 and the context of {self.base.max_seq_len}")

    @property
    def context(self) -> int:
        """How many tokens of a text are read at most."""
        return self.max_text_tokens or self.base.max_seq_len


def is_classifier(folder: Path) -> bool:
    """Whether the folder's config.json names a classifier; False also where it cannot be read."""
    try:
        names = read_json_object(folder / CONFIG_FILE, ConfigError).get("architectures")
    except ConfigError:
        return False
    return isinstance(names, list) and any(name in CLASSIFIER_CLASSES for name in names if isinstance(name, str))


def load_classifier_config(folder: str | Path) -> ClassifierConfig:
    """Raises ConfigError for a folder that is absent, malformed, a language model or cannot be run."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; give a classifier's folder in Hugging Face's format")
    return classifier_config_from_hf(read_json_object(folder / CONFIG_FILE, ConfigError))


def classifier_config_from_hf(values: Mapping[str, object]) -> ClassifierConfig:
    """From the content of config.json. Raises ConfigError, naming the field."""
    fields = JsonFields(values, CONFIG_FILE, ConfigError)
    names = fields.value("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    if isinstance(name, str) and name in MODEL_CLASSES:
        fields.fail("architectures", f"names {name}, a language model; fine-tune it into a classifier first")
    if not isinstance(name, str) or name not in CLASSIFIER_CLASSES:
        fields.fail("architectures", f"must name one of {', '.join(CLASSIFIER_CLASSES)}")
    if fields.string("problem_type", _PROBLEM) != _PROBLEM:
        fields.fail("problem_type", f"must be {_PROBLEM}: each text gets one label")
    base = config_from_hf({**values, "architectures": [_LANGUAGE_MODELS[CLASSIFIER_CLASSES[name]]]})
    pad = fields.integer("pad_token_id") if fields.has("pad_token_id") else None
    length = fields.integer(_MAX_TEXT_TOKENS) if fields.has(_MAX_TEXT_TOKENS) else None
    labels = _labels(fields)
    try:
        return ClassifierConfig(without_head(base), labels, pad, length)
    except ConfigError as problem:
        raise ConfigError(f"{CONFIG_FILE}: {problem}") from None


def without_head(base: ModelConfig) -> ModelConfig:
    """The model's configuration with no language head of its own."""
    return replace(base, tie_word_embeddings=True)


def _labels(fields: JsonFields) -> tuple[str, ...]:
    """In order of their ids; without names they are transformers' LABEL_0, LABEL_1 …"""
    if not fields.has("id2label"):
        return tuple(f"LABEL_{index}" for index in range(fields.integer("num_labels", 2, maximum=MAX_LABELS)))
    names = fields.string_map("id2label")
    if set(names) != {str(index) for index in range(len(names))}:
        fields.fail("id2label", "must name the labels 0, 1, 2 … without a gap")
    if fields.integer("num_labels", len(names)) != len(names):
        fields.fail("num_labels", f"must be {len(names)}, as many as id2label names")
    return tuple(names[str(index)] for index in range(len(names)))


def classifier_config_to_hf(config: ClassifierConfig, dtype: str = "float32") -> dict[str, object]:
    """The content of config.json. Raises ConfigError if no Hugging Face class computes this model."""
    values = config_to_hf(config.base, dtype) | {
        "architectures": [_CLASS_NAMES[config.base.architecture]],
        "problem_type": _PROBLEM,
        "num_labels": len(config.labels),
        "id2label": {str(index): label for index, label in enumerate(config.labels)},
        "label2id": {label: index for index, label in enumerate(config.labels)},
        "pad_token_id": config.pad_token_id,
    }
    return values if config.max_text_tokens is None else values | {_MAX_TEXT_TOKENS: config.max_text_tokens}


def text_ids(tokenizer: Tokenizer, texts: list[str], pad_token_id: int | None) -> list[list[int]]:
    """The tokens of each text, the last of which the head reads; none is cut.

    Padding at the end is left out, as transformers reads the last token before it, and an empty text is its start
    token. Raises TokenizerError for a text that the tokenizer cannot express, or an empty one where there is no token
    to start from.
    """
    return [_without_padding(ids, pad_token_id) or [_start(tokenizer)] for ids in tokenizer.encode_batch(texts)]


def _without_padding(ids: list[int], pad_token_id: int | None) -> list[int]:
    end = len(ids)
    while end and ids[end - 1] == pad_token_id:
        end -= 1
    return ids[:end]


def _start(tokenizer: Tokenizer) -> int:
    start = tokenizer.start_token_id
    if start is None:
        raise TokenizerError("the text is empty and the tokenizer has no start token; leave empty texts out")
    return start
