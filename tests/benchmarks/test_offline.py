"""The engine benchmark on a real, tiny engine, and how it tells decoding from prefill."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import make_model, offline
from benchmarks.offline import BenchmarkError, StepMark, all_decoding
from benchmarks.server_process import ServerError, running_server
from model.checkpoint import load_model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    assert make_model.main(["--preset", "llama-tiny", "--out", str(folder)]) == 0
    return folder


def test_made_models_load_and_depend_on_the_seed(model_folder: Path, tmp_path: Path) -> None:
    assert load_model(model_folder).config.num_layers == 4
    make_model.make_model("llama-tiny", tmp_path / "other", seed=1)
    name = "model.safetensors"
    assert (tmp_path / "other" / name).read_bytes() != (model_folder / name).read_bytes()


def test_an_unknown_preset_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make_model.main(["--preset", "gpt-9", "--out", str(tmp_path / "x")]) == 2
    assert "gpt-9" in capsys.readouterr().err


def test_the_engine_is_measured_at_every_number_of_streams(
    model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(model_folder), "--batches", "1", "3", "--prompt-len", "8", "--output-len", "6"]
    assert offline.main([*arguments, "--device", "cpu", "--threads", "1", "--seconds", "0"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(figures["batches"]) == ["1", "3"]
    for row in figures["batches"].values():
        assert row["runs"] == 1
        assert min(row["prefill"], row["decode"], row["end_to_end"]) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-num-seqs", "2", "--batches", "4"], "raise --max-num-seqs"),
        (["--kv-cache-memory", "600000", "--batches", "8"], "raise --kv-cache-memory"),
        (["--output-len", "1", "--batches", "1"], "raise --output-len"),
    ],
)
def test_a_workload_that_does_not_fit_is_refused(
    options: list[str], message: str, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(model_folder), "--device", "cpu", "--threads", "1", "--seconds", "0"]
    assert offline.main([*arguments, "--prompt-len", "8", "--output-len", "60", *options]) == 1
    assert message in capsys.readouterr().err


def test_only_steps_in_which_all_decode_count() -> None:
    marks = [
        StepMark(at=1.0, started=1, finished=0, tokens=1),
        StepMark(at=2.0, started=2, finished=0, tokens=3),  # the second stream prefilled in this step
        StepMark(at=2.5, started=2, finished=0, tokens=5),
        StepMark(at=3.0, started=2, finished=1, tokens=7),
        StepMark(at=9.0, started=2, finished=2, tokens=8),  # one stream alone
    ]
    assert all_decoding(marks, batch=2) == (4, 1.0)


def test_a_batch_that_never_decodes_together_is_an_error() -> None:
    with pytest.raises(BenchmarkError, match="raise --output-len"):
        all_decoding([StepMark(1.0, 1, 1, 1), StepMark(2.0, 2, 2, 2)], batch=2)


def test_a_server_that_cannot_start_is_reported_with_its_own_words(tmp_path: Path) -> None:
    with (
        pytest.raises(ServerError, match="no-such-model"),
        running_server(["--model", str(tmp_path / "no-such-model")]),
    ):
        pass
