"""The command line, the environment, and the engine's configuration made of them; log lines."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from server.logs import JsonFormatter, TextFormatter
from server.settings import UsageError, bundled_model_path, load_settings, resolve_model_names
from tests.hub_stand_in import HubStandIn, commit_of, take_for_the_hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text("{}")
    return tmp_path / "tiny"


def test_options_become_the_engine_config(folder: Path) -> None:
    options = (
        "--device cpu --dtype bfloat16 --quantization int8 --max-num-seqs 4 --max-num-batched-tokens 99"
        " --kv-cache-memory 2GiB --block-size 32 --no-prefix-caching --num-threads 2 --served-model-name mine"
    )
    config = load_settings(["--model", str(folder), *options.split()]).engine_config()
    assert (config.model_path, config.model_name) == (str(folder), "mine")
    assert (config.device, config.dtype, config.quantization) == ("cpu", "bfloat16", "int8")
    assert (config.max_num_seqs, config.max_num_batched_tokens, config.block_size) == (4, 99, 32)
    assert config.kv_cache_memory == 2 << 30
    assert type(config.kv_cache_memory) is int
    assert (config.prefix_caching, config.num_threads) == (False, 2)


def test_the_name_defaults_to_the_folder(folder: Path) -> None:
    assert load_settings(["--model", f"{folder}/"]).model_name == "tiny"


def test_environment_and_precedence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "QUILL_MODEL": str(folder),
        "QUILL_PORT": "9001",
        "QUILL_KV_CACHE_MEMORY": "512MiB",
        "QUILL_ALLOWED_HOSTS": "a.example, b.example",
        "QUILL_PREFIX_CACHING": "false",
        "QUILL_DRAIN_TIMEOUT": "5",
    }.items():
        monkeypatch.setenv(name, value)
    settings = load_settings(["--port", "9002"])
    assert settings.model_path == folder
    assert settings.port == 9002
    assert settings.kv_cache_memory == 512 << 20
    assert settings.allowed_hosts == ["a.example", "b.example"]
    assert settings.prefix_caching is False
    assert settings.drain_timeout == 5.0
    monkeypatch.setenv("QUILL_PORT", "many")
    with pytest.raises(UsageError, match="QUILL_PORT"):
        load_settings([])


@pytest.mark.parametrize(
    "option",
    [
        "--kv-cache-memory 99999999999999TiB",
        "--kv-cache-memory 1025TiB",
        "--max-num-seqs 1000000000",
        "--max-num-batched-tokens 1000000000",
        "--num-threads 1000000",
        "--block-size 100000",
    ],
)
def test_what_no_machine_could_hold_is_refused_by_name(folder: Path, option: str) -> None:
    with pytest.raises(UsageError, match=f"^{option.split()[0]} "):
        load_settings(["--model", str(folder), *option.split()])


def test_without_a_model_the_bundled_one_is_served(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    assert bundled_model_path().parts[-3:] == ("model", "data", "shakespeare")
    monkeypatch.setattr("server.settings.bundled_model_path", lambda: folder.rename(folder.parent / "shakespeare"))
    monkeypatch.setattr("server.settings._check_model_folder", lambda path: None)
    assert load_settings([]).model == []


@pytest.mark.parametrize("options", ["", "--served-model-name mine"])
def test_a_model_by_name_is_fetched_and_served_under_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: str
) -> None:
    (folder / "model.safetensors").write_bytes(b"weights")
    with HubStandIn({"tiny-org/tiny": {"v1": folder}}) as hub:
        take_for_the_hub(hub, tmp_path / "cache", monkeypatch)
        settings = load_settings(["--model", "tiny-org/tiny@v1", *options.split()])
        assert hub.requests == []
        resolved = resolve_model_names(settings)
        assert resolved.model_name == ("mine" if options else "tiny-org/tiny")
        commit = commit_of("tiny-org/tiny", "v1")
        assert resolved.model_path.name == commit
        assert (resolved.model_path / "config.json").read_bytes() == (folder / "config.json").read_bytes()
        assert capsys.readouterr().err.endswith(f"quill: tiny-org/tiny@v1 is tiny-org/tiny@{commit}\n")
        with pytest.raises(UsageError, match=r"^--model: tiny-org/tiny has no revision v2; name a branch"):
            resolve_model_names(load_settings(["--model", "tiny-org/tiny@v2"]))
    assert resolve_model_names(load_settings(["--model", str(folder)])).model_path == folder


def record(message: str, **extra: object) -> logging.LogRecord:
    entry = logging.LogRecord("server.access", logging.INFO, "file.py", 1, message, None, None)
    entry.__dict__.update(extra)
    return entry


def test_json_lines_hold_known_fields_only() -> None:
    line = JsonFormatter().format(record('say "hi"\n', request_id="req-1", status=200, prompt="secret"))
    entry = json.loads(line)
    assert "\n" not in line
    assert (entry["message"], entry["request_id"], entry["status"]) == ('say "hi"\n', "req-1", 200)
    assert entry["level"] == "info"
    assert "prompt" not in entry


def test_text_lines() -> None:
    line = TextFormatter().format(record("request", request_id="req-1", route="/generate", status=200))
    assert line.endswith("INFO    request request_id=req-1 route=/generate status=200")
