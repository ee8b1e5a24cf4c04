"""Datasets of the Hugging Face library, all of them local: saved ones, and a folder in the hub's layout."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from tests.training.test_prepare import tokens_of
from training.data.compressed import Meter
from training.data.hub_dataset import HubDataset
from training.data.prepare import PrepareRequest, prepare
from training.data.readers import ReadOptions
from training.errors import DataError

TEXTS = [f"row {i} of naïve text" for i in range(40)]


@pytest.fixture(autouse=True)
def offline_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    rows = datasets.Dataset.from_dict({"text": TEXTS, "id": list(range(40))})
    datasets.DatasetDict({"train": rows, "validation": rows.select(range(3))}).save_to_disk(tmp_path / "both")
    rows.save_to_disk(tmp_path / "one")
    return tmp_path


def read(spec: str, streaming: bool = False) -> list[str]:
    return [piece.text for piece in HubDataset("d", spec, "", streaming).read(ReadOptions(), Meter())]


def test_saved_datasets_are_read(saved: Path) -> None:
    assert read(str(saved / "one")) == read(str(saved / "both")) == read(f"{saved}/both@train") == TEXTS
    assert read(f"{saved}/both@validation") == TEXTS[:3]
    with pytest.raises(DataError, match="holds no split 'test', only train, validation"):
        read(f"{saved}/both@test")


@pytest.mark.parametrize("streaming", [True, False])
def test_a_folder_in_the_layout_of_the_hub(streaming: bool, tmp_path: Path) -> None:
    folder = tmp_path / "owner"
    (folder / "data").mkdir(parents=True)
    for split, texts in (("train", TEXTS), ("test", TEXTS[:5])):
        (folder / f"data/{split}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    assert read(f"{folder}@train", streaming) == read(f"{folder}:default", streaming) == TEXTS
    assert read(f"{folder}@test", streaming) == TEXTS[:5]
    for spec in (f"{folder}@nonesuch", f"{folder}:nonesuch", str(tmp_path / "absent")):
        with pytest.raises(DataError, match=r"cannot be opened .*; check its name, config and split"):
            read(spec, streaming)


@pytest.mark.parametrize("tokenizer", ["bytes", "char"])
def test_prepared_like_the_same_rows_of_a_file(tokenizer: str, saved: Path) -> None:
    (saved / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    manifests = {}
    for name, item in (("hub", f"hf:{saved}/both@train"), ("folder", str(saved / "one")), ("file", f"{saved}/a.jsonl")):
        request = PrepareRequest((item,), saved / f"{name}-{tokenizer}", tokenizer, 0.2, workers=1)
        manifests[name], _ = prepare(request)
        assert prepare(request) == (manifests[name], False)
        assert manifests[name].splits == manifests["hub"].splits
        assert tokens_of(request.out, "val")
    assert manifests["hub"].sources[0].bytes == len("".join(TEXTS).encode())
    assert len(manifests["hub"].sources[0].sha256) == 64


def test_a_field_that_is_not_there_is_named(saved: Path) -> None:
    with pytest.raises(DataError, match=r"row 1: has no 'body'.*\(id, text\)"):
        prepare(PrepareRequest((str(saved / "one"),), saved / "out", "bytes", text_keys=("body",)))
    assert not (saved / "out").exists()
