"""The classifier's engine against the classifier alone, and what it does with what it cannot run."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.classifier import Classifier, load_classifier, save_classifier
from model.classifier_config import ClassifierConfig
from model.errors import CheckpointError, ConfigError
from model.presets import create_config
from model.sampling_params import SamplingParams
from server.engine.classification_engine import ClassificationEngine
from server.engine.config import EngineConfig
from server.engine.messages import AddRequest, SequenceOutput
from server.engine.sequence import InvalidSequenceError

VOCAB, CONTEXT = 96, 32
BASE = create_config(
    "llama-tiny", vocab_size=VOCAB, hidden_size=32, num_heads=4, num_layers=2, max_seq_len=64, num_kv_heads=2
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    classifier = Classifier(ClassifierConfig(replace(BASE, tie_word_embeddings=True), ("no", "yes"), 95, CONTEXT))
    classifier.transformer.init_weights(3)
    classifier.init_score(3)
    with torch.no_grad():
        classifier.score.weight.mul_(40.0)
    out = tmp_path_factory.mktemp("engine") / "classifier"
    save_classifier(out, classifier.config, classifier.state_dict(), dtype=torch.float32)
    return out


def make_engine(folder: Path, **values: object) -> ClassificationEngine:
    settings = {"device": "cpu", "dtype": "float32", "num_threads": 1} | values
    return ClassificationEngine(EngineConfig(str(folder), "tiny", **settings))  # type: ignore[arg-type]


def request(number: int, ids: list[int]) -> AddRequest:
    return AddRequest(number, ids, SamplingParams(max_tokens=1), time.monotonic())


def random_texts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, CONTEXT + 1, (count,), generator=generator).tolist()
    return [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def run_all(engine: ClassificationEngine) -> tuple[dict[int, SequenceOutput], list[int]]:
    outputs: dict[int, SequenceOutput] = {}
    sizes = []
    while engine.has_unfinished:
        step = engine.step()
        sizes.append(len(step.outputs))
        outputs |= {output.request_id: output for output in step.outputs}
    return outputs, sizes


def test_scores_are_those_of_the_classifier_alone(folder: Path) -> None:
    engine, texts = make_engine(folder), random_texts(40)
    for number, ids in enumerate(texts):
        engine.add(request(number, ids))
    assert engine.stats().num_waiting == len(texts)
    outputs, sizes = run_all(engine)
    alone = load_classifier(folder, dtype=torch.float32)
    for number, ids in enumerate(texts):
        expected = alone.probabilities([ids])[0].tolist()
        assert outputs[number].scores == pytest.approx(expected, abs=1e-5)
        assert outputs[number].finish_reason == "stop"
        timings = outputs[number].timings
        assert timings is not None
        assert timings.arrival <= timings.first_scheduled <= timings.finished
    assert len({round(output.scores[0], 4) for output in outputs.values() if output.scores}) > 10
    assert len(sizes) < len(texts)
    assert engine.stats().prompt_tokens == sum(map(len, texts))
    assert engine.stats().num_steps == len(sizes)
    assert engine.step().outputs == []


def test_a_batch_keeps_to_its_limits(folder: Path) -> None:
    engine = make_engine(folder, max_num_seqs=3)
    for number in range(8):
        engine.add(request(number, [1, 2]))
    assert run_all(engine)[1] == [3, 3, 2]
    engine = make_engine(folder, max_num_seqs=8, max_num_batched_tokens=20)
    for number, length in enumerate((5, 5, 10, 10, 32, 1)):
        engine.add(request(number, [7] * length))
    assert run_all(engine)[1] == [2, 2, 1, 1]  # filled up to the longest; a text beyond the limit goes alone


def test_a_text_can_be_taken_back(folder: Path) -> None:
    engine = make_engine(folder)
    for number in range(3):
        engine.add(request(number, [1, 2]))
    engine.abort(1)
    engine.abort(99)
    assert sorted(run_all(engine)[0]) == [0, 2]


@pytest.mark.parametrize("ids", [[], [1] * (CONTEXT + 1), [VOCAB], [-1]])
def test_texts_that_cannot_be_run_are_refused(folder: Path, ids: list[int]) -> None:
    engine = make_engine(folder)
    with pytest.raises(InvalidSequenceError, match="prompt"):
        engine.add(request(0, ids))
    assert not engine.has_unfinished


def test_want_of_memory_ends_the_batch_and_nothing_else(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(folder)

    def fail(token_ids: object) -> torch.Tensor:
        raise MemoryError

    engine.add(request(0, [1]))
    with monkeypatch.context() as patch:
        patch.setattr(engine._classifier, "probabilities", fail)
        assert [output.finish_reason for output in engine.step().outputs] == ["error"]
    engine.add(request(1, [1]))
    assert [output.finish_reason for output in engine.step().outputs] == ["stop"]


def test_the_engine_says_what_it_serves(folder: Path) -> None:
    info = make_engine(folder).info
    assert (info.models[0].task, info.models[0].labels, info.models[0].pad_token_id) == (
        "classification", ["no", "yes"], 95,
    )  # fmt: skip
    assert (info.max_model_len, info.num_blocks, info.dtype, info.device) == (CONTEXT, 0, "float32", "cpu")
    assert info.models[0].weights_digest.startswith("sha256:")


def test_what_cannot_be_loaded_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="quantization"):
        make_engine(folder, quantization="int8")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        make_engine(tmp_path)


def test_bfloat16_gives_nearly_the_same(folder: Path) -> None:
    texts = random_texts(12)
    results = []
    for dtype in ("float32", "bfloat16"):
        engine = make_engine(folder, dtype=dtype)
        for number, ids in enumerate(texts):
            engine.add(request(number, ids))
        outputs = run_all(engine)[0]
        results.append([outputs[number].scores for number in range(len(texts))])
    assert torch.tensor(results[0]) == pytest.approx(torch.tensor(results[1]).numpy(), abs=0.05)
