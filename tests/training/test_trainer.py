"""The loop against closed forms and against itself: accumulation, resume, signals, what a run leaves behind."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import training.run
from model.errors import CheckpointError
from tests.training.conftest import ConfigMaker, make_text, train
from training.batches import MicroBatches
from training.checkpoint import step_folders
from training.config import TrainConfig
from training.data.prepare import PrepareRequest, prepare
from training.distributed import Distributed
from training.errors import RecipeError, ResumeError
from training.metrics import flops_per_token
from training.optim import build_optimizer, decay_groups
from training.run import make_trainer, open_inputs
from training.step import StepResult
from training.trainer import Trainer

TrainerMaker = Callable[[TrainConfig], Trainer]


@pytest.fixture
def new_trainer() -> Iterator[TrainerMaker]:
    """A trainer that is driven by hand."""
    alone = Distributed(torch.device("cpu"))
    with contextlib.ExitStack() as stack:

        def make(config: TrainConfig) -> Trainer:
            Path(config.run.dir).mkdir(parents=True, exist_ok=True)
            inputs = open_inputs(config, alone)
            return stack.enter_context(make_trainer(config, inputs, Console(quiet=True), alone))

        yield make


def metrics(config: TrainConfig) -> list[dict[str, object]]:
    """The log without what depends on the clock."""
    lines = [json.loads(line) for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("tokens_per_second", "mfu", "memory")} for line in lines]


def final_bytes(config: TrainConfig) -> list[bytes]:
    """Weights, optimiser state and served weights of the finished run."""
    run = Path(config.run.dir)
    _, state = step_folders(run / "state")[-1]
    folders = (
        state / "training.safetensors",
        *(run / "checkpoints" / n / "model.safetensors" for n in ("last", "best")),
    )
    return [path.read_bytes() for path in folders]


@pytest.mark.usefixtures("report_page")
def test_a_run_leaves_what_the_contract_names(make_config: ConfigMaker) -> None:
    config = make_config(run__keep=1)
    output = train(config)
    run = Path(config.run.dir)
    assert {path.name for path in run.iterdir()} == {
        *(".lock", "config.toml", "metrics.jsonl", "report.html"),
        *("checkpoints", "state"),
    }
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best", "last", "step-8"}
    assert {path.name for path in (run / "state").iterdir()} == {"step-4", "step-8"}
    assert not [path for path in run.rglob("*") if path.suffix in (".pt", ".pkl", ".bin")]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["split"] == "train"] == list(range(1, 9))
    assert [line["step"] for line in lines if line["split"] == "val"] == [4, 8]
    for line in lines:
        assert {"step", "split", "loss", "lr", "tokens_per_second", "mfu", "tokens"} <= line.keys()
        assert line["tokens"] == line["step"] * 4 * 16
        assert line["tokens_per_second"] > 0
        assert line["mfu"] > 0
    manifest = json.loads((run / "checkpoints" / "last" / "manifest.json").read_text())
    assert manifest["step"] == 8
    assert manifest["validation_loss"] == lines[-1]["loss"]
    assert manifest["bits_per_byte"] == lines[-1]["bits_per_byte"]
    assert "finished at step 8" in output


@pytest.mark.parametrize(("dtype", "accumulation"), [("float32", 1), ("bfloat16", 2)])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    dtype: str, accumulation: int, make_config: ConfigMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"train__dtype": dtype, "train__grad_accum_steps": accumulation}
    whole = make_config(run__dir=str(tmp_path / "whole"), **changes)
    train(whole)
    parts = make_config(run__dir=str(tmp_path / "parts"), **changes)
    original = Trainer.train_step
    for stop_before in (3, 6):  # dies between saves: steps since the last one are lost and made again

        def failing(self: Trainer, limit: int = stop_before) -> StepResult:
            if self.progress.step == limit:
                raise ConnectionError("power cut")
            return original(self)

        monkeypatch.setattr(Trainer, "train_step", failing)
        with pytest.raises(ConnectionError):
            train(parts)
    monkeypatch.setattr(Trainer, "train_step", original)
    torch.manual_seed(99)  # a resumed process has another global random state
    assert "from step 4" in train(parts)
    assert final_bytes(parts) == final_bytes(whole)
    assert metrics(parts) == metrics(whole)


def test_sigterm_saves_and_the_run_goes_on_from_there(
    make_config: ConfigMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = (make_config(run__dir=str(tmp_path / name)) for name in ("whole", "parts"))
    train(whole)
    original = Trainer.train_step
    handler = signal.getsignal(signal.SIGTERM)

    def signalling(self: Trainer) -> StepResult:
        if self.progress.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    monkeypatch.setattr(Trainer, "train_step", signalling)
    assert "stopped and saved at step 3" in train(parts)
    assert signal.getsignal(signal.SIGTERM) == handler
    monkeypatch.setattr(Trainer, "train_step", original)
    assert "from step 3" in train(parts)
    assert final_bytes(parts) == final_bytes(whole)
    assert metrics(parts) == metrics(whole)


def test_a_damaged_state_is_passed_over(make_config: ConfigMaker) -> None:
    config = make_config()
    train(config)
    expected = final_bytes(config)
    newest = Path(config.run.dir) / "state" / "step-8" / "training.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    output = train(config)
    assert "removing a damaged state" in output
    assert "from step 4" in output
    assert final_bytes(config) == expected


def test_what_may_not_continue_a_run_is_refused(make_config: ConfigMaker, text_file: Path, tmp_path: Path) -> None:
    config = make_config()
    train(config)
    before = final_bytes(config)
    with pytest.raises(ResumeError, match="already holds a run"):
        train(config, resume="never")
    with pytest.raises(ResumeError, match=r"train\.lr is 0\.5 but this run was started with 0\.01"):
        train(make_config(train__lr=0.5))
    with pytest.raises(ResumeError, match=r"model\.hidden_size is 32"):
        train(make_config(model__hidden_size=32))
    prepare(PrepareRequest((str(text_file),), tmp_path / "other", "bytes", val_fraction=0.2))
    with pytest.raises(ResumeError, match=r"data\.dir .*: other data"):
        train(make_config(data__dir=str(tmp_path / "other")))
    for folder in (Path(config.run.dir) / "state").iterdir():
        (folder / "state.json").write_text("{")
    with pytest.raises(ResumeError, match="holds no whole state"):
        train(config)
    shutil.rmtree(Path(config.run.dir) / "state")
    with pytest.raises(ResumeError, match="checkpoints but no state"):
        train(config)
    assert (Path(config.run.dir) / "checkpoints" / "last" / "model.safetensors").read_bytes() == before[1]
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match="is a file"):
        train(make_config(run__dir=str(tmp_path / "file")))


def test_two_processes_do_not_share_a_run_folder(make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config()
    original = training.run.make_trainer

    def nested(*args: object) -> object:
        monkeypatch.setattr(training.run, "make_trainer", original)
        with pytest.raises(ResumeError, match="another process"):
            train(config)
        return original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(training.run, "make_trainer", nested)
    assert "finished" in train(config)


def test_accumulated_gradients_equal_those_of_the_larger_batch(
    make_config: ConfigMaker, new_trainer: TrainerMaker, tmp_path: Path
) -> None:
    """The same 4 sequences as 1 × 4 and 4 × 1. Only the order of float32 sums differs, hence the tolerance."""
    trainers = []
    for count in (1, 4):
        sizes = {"train__batch_size": 4 // count, "train__grad_accum_steps": count}
        trainers.append(new_trainer(make_config(model__dropout=0.0, run__dir=str(tmp_path / str(count)), **sizes)))
    for _ in range(3):
        one, many = (trainer.train_step().loss for trainer in trainers)
        assert one == pytest.approx(many, rel=1e-5)
    for large, small in zip(*(trainer.model.parameters() for trainer in trainers), strict=True):
        torch.testing.assert_close(large.grad, small.grad, rtol=1e-3, atol=1e-6)


def test_one_step_is_adamw_by_the_book(make_config: ConfigMaker, new_trainer: TrainerMaker) -> None:
    """w − lr·(m̂ / (√v̂ + eps) + decay·w); at the first step m̂ / √v̂ is the gradient's sign."""
    trainer = new_trainer(make_config(model__dropout=0.0, train__warmup_steps=0, train__grad_clip=0.0))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train_step()
    for name, parameter in trainer.model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None
        decay = 0.1 if parameter.dim() >= 2 else 0.0
        old = before[name]
        expected = old - 1e-2 * (gradient / (gradient.abs() + 1e-8) + decay * old)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-4, atol=1e-6)


def test_decay_groups_hold_every_parameter_once(make_config: ConfigMaker, new_trainer: TrainerMaker) -> None:
    trainer = new_trainer(make_config(model__architecture="gpt2", model__num_kv_heads=2))
    decayed, others = decay_groups(trainer.model, 0.3)
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    in_decayed = {names[id(p)] for p in decayed["params"]}  # type: ignore[attr-defined]
    in_others = {names[id(p)] for p in others["params"]}  # type: ignore[attr-defined]
    assert in_decayed | in_others == set(names.values())
    assert not in_decayed & in_others
    assert {"embed_tokens.weight", "embed_positions.weight", "layers.0.attn.qkv_proj.weight"} <= in_decayed
    assert {"final_norm.weight", "layers.1.mlp.up_proj.bias", "layers.0.attn_norm.bias"} <= in_others
    assert build_optimizer(trainer.model, make_config().train).defaults["fused"] is True


def test_gradients_are_clipped(make_config: ConfigMaker, new_trainer: TrainerMaker) -> None:
    trainer = new_trainer(make_config(train__grad_clip=1e-3))
    trainer.train_step()
    norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in trainer.model.parameters()]))  # type: ignore[union-attr]
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_single_batch_is_learnt_by_heart(
    dtype: str,
    make_config: ConfigMaker,
    new_trainer: TrainerMaker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "short.txt").write_text(make_text(40, seed=1), encoding="utf-8")
    data = tmp_path / "short"
    prepare(PrepareRequest((str(tmp_path / "short.txt"),), data, "bytes"))
    config = make_config(
        data__dir=str(data), model__hidden_size=64, model__dropout=0.0, train__max_steps=150, train__batch_size=8,
        train__lr=3e-3, train__dtype=dtype,
    )  # fmt: skip
    trainer = new_trainer(config)
    first_batch = trainer.stepper.batches.get(0)
    monkeypatch.setattr(MicroBatches, "get", lambda self, first: first_batch)
    first = trainer.train_step().loss
    for _ in range(1, 150):
        last = trainer.train_step().loss
    assert first > 4.0
    assert last < 0.3


def test_half_precision_learns_like_single(make_config: ConfigMaker, new_trainer: TrainerMaker, tmp_path: Path) -> None:
    losses = {}
    for dtype in ("float32", "float16"):
        config = make_config(model__dropout=0.0, train__dtype=dtype, run__dir=str(tmp_path / dtype))
        trainer = new_trainer(config)
        losses[dtype] = [trainer.train_step().loss for _ in range(4)]
        assert trainer.stepper.scaler.is_enabled() == (dtype == "float16")
    assert losses["float16"] == pytest.approx(losses["float32"], abs=0.02)
    assert losses["float16"][-1] < losses["float16"][0] - 0.1


def test_a_full_disk_is_one_clear_error_and_keeps_the_last_checkpoint(
    make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    train(make_config(train__max_steps=4))
    before = load_file(Path(config.run.dir) / "checkpoints" / "last" / "model.safetensors")
    monkeypatch.setattr("model.checkpoint.save_file", full)
    with pytest.raises(CheckpointError, match="cannot be written: No space left on device"):
        train(config)
    after = load_file(Path(config.run.dir) / "checkpoints" / "last" / "model.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_samples_are_shown_at_validation(make_config: ConfigMaker) -> None:
    output = train(make_config(run__sample_tokens=5, run__sample_prompt="ink", train__max_steps=4))
    assert output.count("sample: ink") == 1


def test_flops_of_gpt2_124m() -> None:
    """6 · 123,653,376 weights in products + 12 · 12 layers · 768 · 1,024, worked out by hand."""
    from model.presets import create_config
    from model.transformer import Transformer

    config = create_config("gpt2")
    with torch.device("meta"):
        model = Transformer(config)
    assert flops_per_token(model, config, 1_024) == 6 * 123_653_376 + 12 * 12 * 768 * 1_024
    untied = create_config("gpt2-untied")
    with torch.device("meta"):
        model = Transformer(untied)
    assert flops_per_token(model, untied, 1_024) == 6 * 123_653_376 + 12 * 12 * 768 * 1_024


def test_a_preset_takes_the_recipe_s_sizes_and_the_tokenizer_s_vocabulary(make_config: ConfigMaker) -> None:
    config = make_config(model__preset="llama-tiny", model__num_layers=1, train__max_steps=1, train__eval_tokens=20)
    train(config)
    values = json.loads((Path(config.run.dir) / "checkpoints" / "last" / "config.json").read_text())
    assert (values["num_hidden_layers"], values["hidden_size"], values["vocab_size"]) == (1, 16, 257)
    assert (values["intermediate_size"], values["eos_token_id"]) == (64, 256)


def test_impossible_recipes_name_what_is_wrong(make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    cases: list[tuple[dict[str, object], str]] = [
        ({"train__device": "tpu"}, "device 'tpu' is unknown"),
        ({"train__device": "cuda:99"}, "device 'cuda:99' is not available"),
        ({"model__preset": "gpt2"}, "model.architecture is llama but model.preset gpt2 is a gpt2"),
        ({"model__architecture": None}, "model.preset is not set"),
        ({"model__hidden_size": None}, "model.hidden_size is not set"),
        ({"model__hidden_size": 17}, r"model.hidden_size \(17\) must be a multiple"),
        ({"model__num_heads": 0}, "model.num_heads is 0"),
        ({"run__sample_tokens": 4, "run__sample_prompt": "a" * 99}, "run.sample_prompt has .* must leave room"),
        ({"run__sample_tokens": 4, "run__sample_prompt": "\udcff"}, "run.sample_prompt: .*lone surrogate"),
    ]
    for changes, message in cases:
        given = {name: value for name, value in changes.items() if value is not None}
        config = make_config(**given)
        for name, value in changes.items():
            if value is None:
                object.__setattr__(config.model, name.partition("__")[2], None)
        with pytest.raises(RecipeError, match=message):
            train(config)
        assert not Path(config.run.dir).exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="WORLD_SIZE is 2 but RANK is not set; start the run by torchrun"):
        train(make_config())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch.compile's own imports
def test_compiled_training_equals_eager(make_config: ConfigMaker, new_trainer: TrainerMaker, tmp_path: Path) -> None:
    losses = []
    for compiled in (False, True):
        config = make_config(
            model__dropout=0.0,
            train__compile=compiled,
            train__grad_accum_steps=2,
            run__dir=str(tmp_path / f"{compiled}"),
        )
        trainer = new_trainer(config)
        losses.append([trainer.train_step().loss for _ in range(3)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
