"""The engine's kernels beside the logits that were stored with the weights: rounding passes, another model does not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model.config import ModelConfig
from model.errors import CheckpointError
from model.manifest import MANIFEST_FILE, file_sha256, read_manifest
from model.self_check import tolerance
from server.engine.config import EngineConfig
from server.engine.llm_engine import LLMEngine
from server.engine.messages import FAILED, PASSED, UNCHECKED, SelfCheckResult
from tests.engine.conftest import MODELS, make_checkpoint

KINDS = [("float32", "none"), ("bfloat16", "none"), ("bfloat16", "int8")]


def config_of(folder: Path, dtype: str = "float32", quantization: str = "none", **values: Any) -> EngineConfig:
    config = EngineConfig(str(folder), "m", device="cpu", dtype=dtype, quantization=quantization, num_threads=1)
    return replace(config, **values)


def check(config: EngineConfig) -> SelfCheckResult:
    return LLMEngine(config).info.models[0].self_check


def edit_manifest(folder: Path, **changes: object) -> None:
    path = folder / MANIFEST_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(("dtype", "quantization"), KINDS)
def test_what_was_saved_is_what_is_computed(checkpoint: Path, dtype: str, quantization: str) -> None:
    result = check(config_of(checkpoint, dtype, quantization))
    assert result.status == PASSED
    assert result.reason is None
    assert result.error is not None
    # Well inside the tolerance, or another machine's rounding would fail.
    assert result.error < tolerance(dtype, quantization) / 2
    assert result.error < 1e-5 or dtype == "bfloat16"


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize(("dtype", "quantization"), KINDS)
def test_a_misread_model_fails_in_every_type(name: str, dtype: str, quantization: str, tmp_path: Path) -> None:
    """The weights are whole; config.json says something else of them, as after a mistake in a converter."""
    folder = make_checkpoint(MODELS[name], tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config |= {"gpt2": {"layer_norm_epsilon": 3.0}, "llama": {"rope_theta": 3.0, "rms_norm_eps": 3.0}}[name]
    (folder / "config.json").write_text(json.dumps(config))
    manifest = read_manifest(folder)
    assert manifest is not None
    edit_manifest(folder, files={k: v for k, v in manifest.files.items() if k != "config.json"} | _digest(folder))
    result = check(config_of(folder, dtype, quantization))
    assert result.status == FAILED
    assert result.reason is not None
    assert "off by" in result.reason
    with pytest.raises(
        CheckpointError, match=r"^m does not compute what was stored .* start without strict_self_check"
    ):
        LLMEngine(config_of(folder, dtype, quantization, strict_self_check=True))


def _digest(folder: Path) -> dict[str, str]:
    return {"config.json": file_sha256(folder / "config.json")}


def test_a_folder_without_stored_logits_is_unchecked_and_strict_lets_it_pass(tmp_path: Path) -> None:
    folder = make_checkpoint(MODELS["llama"], tmp_path / "m")
    content = json.loads((folder / MANIFEST_FILE).read_text())
    del content["self_check"]
    (folder / MANIFEST_FILE).write_text(json.dumps(content))
    result = check(config_of(folder, strict_self_check=True))
    assert result.status == UNCHECKED
    assert result.error is None
    (folder / MANIFEST_FILE).unlink()
    assert check(config_of(folder)).status == UNCHECKED


def test_logits_of_a_larger_vocabulary_fail_without_being_looked_up(tmp_path: Path) -> None:
    folder = make_checkpoint(MODELS["llama"], tmp_path / "m")
    edit_manifest(folder, self_check={"prompt": [1, 5000], "token_ids": [1], "logits": [[0.5]]})
    result = check(config_of(folder))
    assert (result.status, result.error) == (FAILED, None)
    assert "another vocabulary" in str(result.reason)


@pytest.mark.parametrize(
    "limits", [{"max_num_batched_tokens": 3, "max_num_seqs": 2}, {"block_size": 3, "attention_backend": "torch"}]
)
def test_small_limits_do_not_stop_it(checkpoint: Path, limits: dict[str, Any]) -> None:
    assert check(config_of(checkpoint, **limits)).status == PASSED


def test_requests_after_it_are_not_told_from_requests_without_it(tmp_path: Path) -> None:
    """Its blocks are free again: a sequence that takes all of them fits."""
    model: ModelConfig = MODELS["llama"]
    folder = make_checkpoint(model, tmp_path / "m")
    engine = LLMEngine(config_of(folder))
    assert engine.block_manager.num_free_blocks == engine.block_manager.num_blocks
    assert not engine.has_unfinished
