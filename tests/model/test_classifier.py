"""Classifiers against transformers' …ForSequenceClassification in both directions, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.checkpoint import load_model, read_manifest, save_model
from model.classifier import Classifier, load_classifier, pad, save_classifier
from model.classifier_config import (
    ClassifierConfig,
    classifier_config_from_hf,
    classifier_config_to_hf,
    is_classifier,
    load_classifier_config,
    text_ids,
)
from model.config import ModelConfig
from model.errors import CheckpointError, ConfigError, TokenizerError
from model.presets import create_config
from model.tokenizer import Tokenizer
from model.transformer import Transformer

pytestmark = pytest.mark.usefixtures("quiet_transformers")
TOLERANCE = 1e-4
VOCAB, PAD = 96, 95
LABELS = ("ham", "spam", "naïve ✓")
_GPT = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_LLAMA = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
THEIRS: dict[str, Callable[..., Any]] = {
    "gpt2": lambda **more: transformers.GPT2Config(**_GPT, **more),
    "gpt1": lambda **more: transformers.OpenAIGPTConfig(**_GPT, **more),
    "llama": lambda **more: transformers.LlamaConfig(**_LLAMA, **more),
    "llama-tied": lambda **more: transformers.LlamaConfig(**_LLAMA, tie_word_embeddings=True, **more),
    "mistral-window": lambda **more: transformers.MistralConfig(**_LLAMA, sliding_window=6, **more),
    "qwen2": lambda **more: transformers.Qwen2Config(**_LLAMA, **more),
    "qwen3": lambda **more: transformers.Qwen3Config(**_LLAMA, head_dim=16, **more),
}
_SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "num_heads": 4, "num_layers": 2, "max_seq_len": 64}
_SMALL_LLAMA = create_config("llama-tiny", **_SMALL, num_kv_heads=2)
OURS: dict[str, ModelConfig] = {
    "gpt2": create_config("gpt2", **_SMALL),
    "gpt2-no-bias": create_config("gpt2", **_SMALL, bias=False),
    "gpt1": create_config("openai-gpt", **_SMALL),
    "llama": _SMALL_LLAMA,
    "llama-untied": replace(_SMALL_LLAMA, tie_word_embeddings=False),
    "mistral-window": replace(_SMALL_LLAMA, architecture="mistral", sliding_window=6),
    "qwen2": replace(_SMALL_LLAMA, architecture="qwen2", qkv_bias=True),
    "qwen3": replace(_SMALL_LLAMA, architecture="qwen3", qk_norm=True, head_dim=16),
}


@pytest.fixture
def texts() -> list[list[int]]:
    """Texts of several lengths; one holds the padding token inside, one is a single token."""
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, PAD, (length,), generator=generator).tolist() for length in (20, 3, 11, 1)]
    ids[2][4] = PAD
    return ids


def _randomise(model: torch.nn.Module) -> None:
    """Move every parameter off its initial value: zero biases and unit norms would hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)


def _their_logits(model: Any, texts: list[list[int]], *, left: bool = False) -> Tensor:
    """As their batches are: filled up with the padding token, and an attention mask."""
    width = max(map(len, texts))
    fill = [[PAD] * (width - len(ids)) for ids in texts]
    rows = [f + ids if left else ids + f for ids, f in zip(texts, fill, strict=True)]
    mask = [[0] * len(f) + [1] * len(ids) if left else [1] * len(ids) + [0] * len(f)
            for ids, f in zip(texts, fill, strict=True)]  # fmt: skip
    with torch.no_grad():
        return model(input_ids=torch.tensor(rows), attention_mask=torch.tensor(mask)).logits


def _make(base: ModelConfig, labels: tuple[str, ...] = LABELS, **values: Any) -> Classifier:
    classifier = Classifier(ClassifierConfig(replace(base, tie_word_embeddings=True), labels, PAD, **values)).eval()
    classifier.transformer.init_weights()
    classifier.init_score()
    _randomise(classifier)
    return classifier


def _save(folder: Path, classifier: Classifier, **options: Any) -> Path:
    save_classifier(folder, classifier.config, classifier.state_dict(), dtype=torch.float32, **options)
    return folder


@pytest.mark.parametrize("name", THEIRS)
@torch.no_grad()
def test_their_classifiers_load_and_give_their_logits(name: str, tmp_path: Path, texts: list[list[int]]) -> None:
    config = THEIRS[name](
        id2label=dict(enumerate(LABELS)), label2id={v: k for k, v in enumerate(LABELS)}, pad_token_id=PAD
    )
    theirs = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    _randomise(theirs)
    theirs.save_pretrained(tmp_path)
    ours = load_classifier(tmp_path)
    assert ours.config.labels == LABELS
    assert ours.config.pad_token_id == PAD
    expected = _their_logits(theirs, texts)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(ours(*pad(texts)), expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("name", OURS)
@torch.no_grad()
def test_transformers_gives_the_logits_of_ours(name: str, tmp_path: Path, texts: list[list[int]]) -> None:
    ours = _make(OURS[name])
    _save(tmp_path / "m", ours)
    theirs, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "m", output_loading_info=True
    )
    assert {key: value for key, value in report.items() if value} == {}
    assert theirs.config.id2label == dict(enumerate(LABELS))
    assert theirs.config.label2id == {label: index for index, label in enumerate(LABELS)}
    expected = ours(*pad(texts))
    torch.testing.assert_close(_their_logits(theirs.eval(), texts), expected, atol=TOLERANCE, rtol=TOLERANCE)
    again = load_classifier(tmp_path / "m")
    torch.testing.assert_close(again(*pad(texts)), expected)


def test_labels_without_names_are_those_of_transformers(tmp_path: Path) -> None:
    config = THEIRS["gpt2"](num_labels=4)
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    ours = load_classifier(tmp_path)
    assert ours.config.labels == ("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3")
    assert ours.config.pad_token_id is None


@torch.no_grad()
def test_a_text_has_the_same_logits_in_any_company(texts: list[list[int]]) -> None:
    classifier = _make(_SMALL_LLAMA)
    together = classifier(*pad(texts))
    alone = torch.cat([classifier(*pad([ids])) for ids in texts])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)
    assert len({tuple(row) for row in together.tolist()}) == len(texts)


def test_probabilities_are_the_softmax(texts: list[list[int]]) -> None:
    classifier = _make(_SMALL_LLAMA)
    found = classifier.probabilities(texts)
    with torch.no_grad():
        logits = classifier(*pad(texts))
    torch.testing.assert_close(found, logits.exp() / logits.exp().sum(-1, keepdim=True))
    classifier.pack_for_cpu()
    torch.testing.assert_close(classifier.probabilities(texts), found, atol=1e-5, rtol=1e-4)


def test_a_folder_has_a_manifest_and_may_be_sharded(tmp_path: Path, texts: list[list[int]]) -> None:
    classifier = _make(_SMALL_LLAMA, max_text_tokens=20)
    folder = _save(tmp_path / "m", classifier, tokenizer=Tokenizer.bytes(), max_shard_bytes=20_000)
    manifest = read_manifest(folder)
    assert manifest is not None
    assert set(manifest.files) == {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert (folder / "model.safetensors.index.json").exists()
    again = load_classifier(folder)
    assert again.config == classifier.config
    assert again.config.context == 20
    assert torch.equal(again.probabilities(texts), classifier.probabilities(texts))


def test_half_precision_comes_back(tmp_path: Path) -> None:
    classifier = _make(_SMALL_LLAMA)
    save_classifier(tmp_path / "m", classifier.config, classifier.state_dict(), dtype=torch.bfloat16)
    again = load_classifier(tmp_path / "m")
    assert again.dtype == torch.bfloat16
    assert torch.equal(again.score.weight, classifier.score.weight.bfloat16())


def test_each_loader_refuses_the_others_folder(tmp_path: Path) -> None:
    classifier = _save(tmp_path / "c", _make(_SMALL_LLAMA))
    model = Transformer(_SMALL_LLAMA)
    model.init_weights()
    save_model(tmp_path / "m", model)
    assert is_classifier(classifier)
    assert not is_classifier(tmp_path / "m")
    assert not is_classifier(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="LlamaForSequenceClassification, which labels texts and writes none"):
        load_model(classifier)
    with pytest.raises(ConfigError, match="LlamaForCausalLM, a language model"):
        load_classifier(tmp_path / "m")
    with pytest.raises(ConfigError, match="is not a folder"):
        load_classifier(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["BertForSequenceClassification"]}, "architectures must name one of"),
        ({"architectures": []}, "architectures must name one of"),
        ({"problem_type": "regression"}, "problem_type must be single_label_classification"),
        ({"problem_type": "multi_label_classification"}, "problem_type must be"),
        ({"id2label": {"0": "a"}, "num_labels": None}, "labels must number 2"),
        ({"id2label": {"0": "a", "2": "b"}}, "id2label must name the labels 0, 1, 2"),
        ({"id2label": {"0": "a", "1": "a"}, "num_labels": None}, "labels must be different"),
        ({"id2label": {"0": "a", "1": ""}, "num_labels": None}, "none of them empty"),
        ({"id2label": {"0": "a", "1": 5}}, "id2label must map names to strings"),
        ({"id2label": ["a", "b"]}, "id2label must be an object"),
        ({"num_labels": 7}, "num_labels must be 3"),
        ({"id2label": None, "num_labels": 1}, "labels must number 2"),
        ({"id2label": None, "num_labels": 10**9}, "num_labels must be an integer"),
        ({"pad_token_id": VOCAB}, "pad_token_id must be a token of the vocabulary"),
        ({"max_text_tokens": 65}, "max_text_tokens must lie between 1 and the context of 64"),
        ({"hidden_size": 0}, "hidden_size must be an integer"),
    ],
)
def test_a_config_that_cannot_be_run_is_refused(changes: dict[str, object], message: str) -> None:
    values = classifier_config_to_hf(ClassifierConfig(_SMALL_LLAMA, LABELS, PAD)) | changes
    with pytest.raises(ConfigError, match=message):
        classifier_config_from_hf(values)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder = _save(tmp_path / "m", _make(_SMALL_LLAMA))
    (folder / "manifest.json").unlink()
    good = load_file(folder / "model.safetensors")

    def refused(tensors: dict[str, Tensor], message: str) -> None:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=message):
            load_classifier(folder)

    refused({name: value for name, value in good.items() if name != "score.weight"}, "lacks the tensors score.weight")
    refused(good | {"score.bias": torch.zeros(3)}, r"does not describe: score\.bias")
    refused(good | {"score.weight": torch.zeros(2, 32)}, r"score\.weight \[2, 32\] instead of \[3, 32\]")
    refused(good | {"score.weight": torch.full((3, 32), torch.nan)}, "not finite")


def test_a_damaged_copy_is_told(tmp_path: Path) -> None:
    folder = _save(tmp_path / "m", _make(_SMALL_LLAMA))
    values = json.loads((folder / "config.json").read_text())
    values["id2label"] = {"0": "spam", "1": "ham", "2": "other"}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"config\.json differs from its sha256"):
        load_classifier(folder)


def test_what_is_no_number_is_not_saved(tmp_path: Path) -> None:
    classifier = _make(_SMALL_LLAMA)
    state = classifier.state_dict()
    state["score.weight"][0, 0] = torch.inf
    with pytest.raises(CheckpointError, match=r"score\.weight holds values that are not finite"):
        save_classifier(tmp_path / "m", classifier.config, state, dtype=torch.float32)
    assert not (tmp_path / "m").exists()


def test_texts_end_where_transformers_reads_them() -> None:
    class Ending:
        """A tokenizer whose post-processor closes each text with the token that also fills up batches."""

        start_token_id = 256

        def encode_batch(self, texts: list[str]) -> list[list[int]]:
            return [[*text.encode(), 256, 256] for text in texts]

    assert text_ids(Ending(), ["ab", ""], 256) == [[97, 98], [256]]  # type: ignore[arg-type]
    assert text_ids(Tokenizer.bytes(), ["é", ""], None) == [[0xC3, 0xA9], [256]]
    with pytest.raises(TokenizerError, match="the text is empty"):
        text_ids(Tokenizer.characters("ab", end_of_text=False), [""], None)


def test_the_config_comes_back(tmp_path: Path) -> None:
    config = ClassifierConfig(_SMALL_LLAMA, LABELS, PAD, 17)
    (tmp_path / "config.json").write_text(json.dumps(classifier_config_to_hf(config)))
    assert load_classifier_config(tmp_path) == config
