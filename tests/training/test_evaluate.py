"""Loss and bits per byte against transformers, and the loss in chunks against the loss at once."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from model.sampling_params import SamplingParams
from model.tokenizer import Tokenizer
from tests.training.conftest import ConfigMaker, train
from training import loss as loss_module
from training.data.dataset import open_split
from training.data.prepare import PrepareRequest, prepare
from training.errors import DataError, RecipeError
from training.evaluate import evaluate_checkpoint, evaluate_loss
from training.evaluation.text import TextTokens, encode_files
from training.generate import generate_from_checkpoint
from training.loss import summed_cross_entropy


@pytest.fixture(params=["llama", "gpt2"])
def checkpoint(request: pytest.FixtureRequest, make_config: ConfigMaker) -> Path:
    config = make_config(model__architecture=request.param, model__num_kv_heads=2, train__max_steps=4)
    train(config)
    return Path(config.run.dir) / "checkpoints" / "last"


def transformers_loss(folder: Path, ids: torch.Tensor, seq_len: int) -> float:
    """Nats per predicted token over windows of `seq_len` predictions, one at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, seq_len):
            window = ids[start : start + seq_len + 1]
            logits = model(window[None, :-1]).logits[0]
            total += F.cross_entropy(logits, window[1:], reduction="sum").item()
    return total / (len(ids) - 1)


def test_a_trained_checkpoint_gives_the_same_loss_in_transformers(checkpoint: Path, data_dir: Path) -> None:
    split = open_split(data_dir, "val")
    ids = torch.from_numpy(split.read(0, split.num_tokens))
    result = evaluate_checkpoint(checkpoint, data=data_dir, batch_size=3, device="cpu")
    expected = transformers_loss(checkpoint, ids, 32)
    assert result.loss == pytest.approx(expected, abs=1e-5)
    assert result.tokens == split.num_tokens - 1
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-4)
    assert result.bits_per_byte == pytest.approx(expected / math.log(2), rel=1e-4)
    text = "ink and naïve quills"
    assert AutoTokenizer.from_pretrained(checkpoint)(text)["input_ids"] == Tokenizer.load(checkpoint).encode(text)


def test_bits_per_byte_counts_bytes_of_the_text_not_tokens(checkpoint: Path, tmp_path: Path) -> None:
    text = "the quill writes स्याही 🖋 " * 5
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    result = evaluate_checkpoint(checkpoint, text=tmp_path / "a.txt", device="cpu")
    ids = torch.tensor(Tokenizer.bytes().encode(text))
    assert result.bits_per_byte == pytest.approx(transformers_loss(checkpoint, ids, 32) / math.log(2), rel=1e-4)
    gpt2 = encode_files([tmp_path / "a.txt"], Tokenizer.gpt2())
    assert gpt2.num_bytes == len(text.encode()) > gpt2.num_tokens


def test_overlapping_windows_predict_every_token_once(checkpoint: Path, data_dir: Path) -> None:
    """With stride 1 each token sees all the context there is: the same as one window per token."""
    from model.checkpoint import load_model

    model = load_model(checkpoint)
    split = open_split(data_dir, "val")
    tokens = TextTokens(split.read(0, 41), 41)
    result = evaluate_loss(model, tokens, seq_len=8, stride=1, batch_size=4)
    expected = 0.0
    with torch.no_grad():
        for position in range(1, 41):
            start = max(0, position - 8)
            context = torch.from_numpy(tokens.read(start, position - start))[None]
            logits = model.compute_logits(model(context)[0, -1])
            expected -= torch.log_softmax(logits, -1)[int(tokens.ids[position])].item()
    assert result.loss == pytest.approx(expected / 40, abs=1e-5)
    assert result.tokens == 40
    for stride in (3, 5, 8):
        assert evaluate_loss(model, tokens, seq_len=8, stride=stride).tokens == 40
    assert evaluate_loss(model, tokens, seq_len=8, max_tokens=13).tokens == 13


def test_any_split_of_prepared_and_of_raw_data(checkpoint: Path, text_file: Path, tmp_path: Path) -> None:
    """Raw token files do not say what they were encoded with: it is the checkpoint's tokenizer."""
    prepare(PrepareRequest((str(text_file),), tmp_path / "data", "bytes", test_fraction=0.2))
    split = open_split(tmp_path / "data", "test")
    result = evaluate_checkpoint(checkpoint, data=tmp_path / "data", split="test", device="cpu")
    ids = torch.from_numpy(split.read(0, split.num_tokens))
    assert result.tokens == len(ids) - 1
    assert result.loss == pytest.approx(transformers_loss(checkpoint, ids, 32), abs=1e-5)
    with pytest.raises(DataError, match="holds no dev split"):
        evaluate_checkpoint(checkpoint, data=tmp_path / "data", split="dev")
    (tmp_path / "raw").mkdir()
    ids.numpy().astype("<u2").tofile(tmp_path / "raw" / "val.bin")
    raw = evaluate_checkpoint(checkpoint, data=tmp_path / "raw", device="cpu")
    assert raw.loss == pytest.approx(result.loss, abs=1e-6)
    assert raw.bits_per_byte == pytest.approx(result.bits_per_byte, rel=0.02)


def test_chunked_loss_and_gradients_equal_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(3, 7, 5, requires_grad=True)
    head = torch.randn(11, 5, requires_grad=True)
    targets = torch.randint(0, 11, (3, 7))

    def total() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        hidden.grad = head.grad = None
        loss = summed_cross_entropy(lambda h: F.linear(h, head), hidden, targets, vocab_size=11)
        torch.autograd.backward(loss)
        assert hidden.grad is not None
        assert head.grad is not None
        return loss.detach(), hidden.grad, head.grad

    whole = total()
    monkeypatch.setattr(loss_module, "MAX_LOGITS", 44)
    torch.testing.assert_close(total(), whole)
    plain = F.cross_entropy(F.linear(hidden, head).flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(whole[0], plain.detach())


def test_what_cannot_be_evaluated_is_named(checkpoint: Path, data_dir: Path, text_file: Path, tmp_path: Path) -> None:
    prepare(PrepareRequest((str(text_file),), tmp_path / "char", "char"))
    (tmp_path / "empty.txt").touch()
    (tmp_path / "one.txt").write_text("x")
    with pytest.raises(DataError, match="prepared with another tokenizer"):
        evaluate_checkpoint(checkpoint, data=tmp_path / "char")
    with pytest.raises(DataError, match="the file is empty"):
        evaluate_checkpoint(checkpoint, text=tmp_path / "empty.txt")
    with pytest.raises(DataError, match="fewer than two tokens"):
        evaluate_checkpoint(checkpoint, text=tmp_path / "one.txt")
    with pytest.raises(DataError, match="cannot be read"):
        evaluate_checkpoint(checkpoint, text=tmp_path / "absent.txt")
    with pytest.raises(RecipeError, match="--seq-len is 64 but the model's context is 32"):
        evaluate_checkpoint(checkpoint, data=data_dir, seq_len=64)
    with pytest.raises(RecipeError, match="--stride is 33"):
        evaluate_checkpoint(checkpoint, data=data_dir, stride=33)
    with pytest.raises(RecipeError, match="give either --data or --text"):
        evaluate_checkpoint(checkpoint)


def test_padding_of_the_vocabulary_is_never_generated(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 320, "n_embd": 16, "n_head": 2, "n_layer": 1, "n_positions": 64}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path)
    Tokenizer.bytes().save(tmp_path)
    params = [SamplingParams(max_tokens=50, temperature=2.0)]
    sample = generate_from_checkpoint(tmp_path, "hello", params, device="cpu", dtype=torch.float32)[0]
    assert max(sample.token_ids) < 257


def test_generated_text_depends_on_the_seed_alone(checkpoint: Path) -> None:
    def texts(*seeds: int, prompt: str = "the ") -> list[tuple[str, list[int]]]:
        params = [SamplingParams(max_tokens=9, seed=seed) for seed in seeds]
        samples = generate_from_checkpoint(checkpoint, prompt, params, device="cpu", dtype=torch.float32)
        return [(sample.text, sample.token_ids) for sample in samples]

    assert texts(1, 2) == texts(1, 2)
    assert texts(1) != texts(2)
    assert len(texts(1, prompt="")[0][1]) <= 9
