"""The self-test passes what is sound and names what is not: each fault is found by its own check."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.checkpoint import load_model
from model.dense_cache import DenseKVCache
from model.generate import GenerationOutput
from model.generate_batch import generate_batch
from model.tokenizer import StreamDecoder, Tokenizer
from model.transformer import Transformer
from tests.training.conftest import Command
from tests.training.tiny_models import save_tiny_model
from training import selftest
from training.selftest import CHECKS, Subject, load_subject, run_checks


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    return load_subject(save_tiny_model(tmp_path / "model", "gpt2"), "tiny", "cpu")


def failed(subject: Subject) -> set[str]:
    return {check.name for check in run_checks(subject) if not check.passed}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_sound_model_passes(family: str, tmp_path: Path) -> None:
    checks = run_checks(load_subject(save_tiny_model(tmp_path / "model", family), "tiny", "cpu"))
    assert [(check.name, check.passed) for check in checks] == [(name, True) for name in CHECKS]


def test_a_look_ahead_is_found(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Transformer.forward

    def leaky(self: Transformer, input_ids: Tensor, cache: DenseKVCache | None = None) -> Tensor:
        hidden = original(self, input_ids, cache)
        return hidden + 0.05 * hidden.roll(-1, dims=1) if cache is None else hidden

    monkeypatch.setattr(Transformer, "forward", leaky)
    assert "causality" in failed(subject)


def test_a_model_that_ignores_its_input_is_found(subject: Subject) -> None:
    with torch.no_grad():
        subject.model.embed_tokens.weight.zero_()
    assert "causality" in failed(subject)


def test_weights_that_are_no_numbers_are_found(subject: Subject) -> None:
    with torch.no_grad():
        subject.model.embed_tokens.weight[:, 2] = torch.nan
    found = {check.name: check.detail for check in run_checks(subject) if not check.passed}
    assert "are not finite" in found["forward"]
    assert "loss is nan" in found["gradients"]
    assert "save and load" in found


def test_positions_that_restart_under_the_cache_are_found(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    original = DenseKVCache.extend
    monkeypatch.setattr(
        DenseKVCache,
        "extend",
        lambda self, count: (torch.zeros(2 * count, dtype=torch.int64), original(self, count)[1]),
    )
    assert failed(subject) >= {"KV cache"}


def test_a_detached_weight_is_found(subject: Subject) -> None:
    subject.model.layers[0].attn.o_proj.weight.requires_grad_(False)
    found = {check.name for check in run_checks(subject) if not check.passed}
    assert found == {"gradients"}


def test_other_tokens_in_a_batch_are_found(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def crossed(*args: object, **options: object) -> list[GenerationOutput]:
        return list(reversed(generate_batch(*args, **options)))  # type: ignore[arg-type]

    monkeypatch.setattr(selftest, "generate_batch", crossed)
    assert failed(subject) == {"batch"}


def test_lost_text_is_found(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StreamDecoder, "finish", lambda self: "lost")
    assert failed(subject) == {"streaming"}


def test_rounded_weights_are_found(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def rounded(folder: Path, **options: object) -> Transformer:
        model = load_model(folder)
        with torch.no_grad():
            model.embed_tokens.weight.copy_(model.embed_tokens.weight.bfloat16())
        return model

    monkeypatch.setattr(selftest, "load_model", rounded)
    assert failed(subject) == {"save and load"}


def test_too_large_a_vocabulary_is_found(subject: Subject) -> None:
    characters = Tokenizer.characters("".join(map(chr, range(100, 500))))
    found = failed(Subject(subject.model, characters, subject.input_ids))
    assert "vocabulary" in found


@pytest.fixture
def call(command: Command) -> Command:
    return lambda *args: command("selftest", *args, "--device", "cpu")


def test_the_command_shows_a_table_and_its_status(
    call: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny_model(tmp_path / "model", "llama")
    status, out, err = call(folder)
    assert (status, err) == (0, "")
    assert out.splitlines()[-1] == "all passed"
    assert len(out.splitlines()) == len(CHECKS) + 1
    monkeypatch.setattr(StreamDecoder, "finish", lambda self: "lost")
    status, out, _ = call(folder)
    assert status == 1
    assert "streaming      FAILED  the streamed text is not the decoded one" in out
    assert out.splitlines()[-1] == f"1 of {len(CHECKS)} failed"
    status, out, _ = call(folder, "--json")
    values = json.loads(out)
    assert (status, values["passed"], values["model"]) == (1, False, str(folder))
    assert [check["name"] for check in values["checks"] if not check["passed"]] == ["streaming"]


def test_the_command_builds_a_preset_and_refuses_what_it_cannot(call: Command) -> None:
    status, out, _ = call()
    assert (status, out.splitlines()[-1]) == (0, "all passed")
    assert "preset 'none' is unknown" in call("--preset", "none")[2]
    assert call("absent")[2].startswith("error: absent is neither a folder")
    assert "--preset has no meaning for absent" in call("absent", "--preset", "tiny")[2]
