"""Checkpoint folders: manifest, verification, refusal of what is damaged or foreign, and saving whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model import atomic_folder
from model.atomic_folder import replace_folder
from model.checkpoint import load_model, save_model, save_state_dict
from model.errors import CheckpointError, ConfigError, QuillError
from model.manifest import Provenance, make_manifest, manifest_json, read_manifest, weights_digest
from model.presets import create_config
from model.transformer import Transformer

CONFIG = create_config("gpt2", vocab_size=40, hidden_size=16, num_heads=2, num_layers=2, max_seq_len=16)
PROVENANCE = Provenance(step=500, run="r-1", data="sha256:ab", validation_loss=1.47, bits_per_byte=2.12)


class _Tokenizer:
    def save(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")


def _make_model(seed: int = 0) -> Transformer:
    model = Transformer(CONFIG).eval()
    model.init_weights(seed)
    return model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with one weight file."""
    save_model(tmp_path / "m", _make_model(), tokenizer=_Tokenizer(), provenance=PROVENANCE)
    return tmp_path / "m"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_model(tmp_path / "s", _make_model(), max_shard_bytes=6_000)
    return tmp_path / "s"


def _same_weights(first: Transformer, second: Transformer) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def _edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_model_comes_back_as_it_was(saved: Path) -> None:
    model = load_model(saved)
    assert not model.training
    assert model.config == CONFIG
    assert _same_weights(model, _make_model())
    assert all(parameter.is_contiguous() for parameter in model.parameters())


def test_the_folder_holds_the_agreed_files(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == [
        "config.json", "generation_config.json", "manifest.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    header_size = int.from_bytes((saved / "model.safetensors").read_bytes()[:8], "little")
    header = json.loads((saved / "model.safetensors").read_bytes()[8 : 8 + header_size])
    assert header["__metadata__"] == {"format": "pt"}


def test_all_files_follow_the_umask(saved: Path, sharded: Path) -> None:
    """A server under another user reads what a trainer wrote."""
    for folder in (saved, sharded):
        assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


def test_the_model_does_not_depend_on_its_files_afterwards(saved: Path) -> None:
    model = load_model(saved)
    with (saved / "model.safetensors").open("r+b") as file:
        file.write(b"\0" * (saved / "model.safetensors").stat().st_size)
    assert _same_weights(model, _make_model())


def test_loading_does_not_import_the_compiler(saved: Path) -> None:
    """torch._dynamo takes longer to import than torch itself, and a server's start should not wait for it."""
    code = """if True:
        import sys
        from model.checkpoint import load_model
        load_model(sys.argv[1])
        sys.exit("torch._dynamo" in sys.modules)
    """
    assert subprocess.run([sys.executable, "-c", code, str(saved)], check=False).returncode == 0


def test_loaded_weights_can_be_trained(saved: Path) -> None:
    model = load_model(saved)
    model.compute_logits(model(torch.zeros(1, 4, dtype=torch.long))).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_manifest_tells_files_and_training(saved: Path) -> None:
    manifest = read_manifest(saved)
    assert manifest is not None
    assert manifest.provenance == PROVENANCE
    expected = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in saved.iterdir()
        if path.name != "manifest.json"
    }
    assert manifest.files == expected
    assert manifest.weights == f"sha256:{expected['model.safetensors']}" == weights_digest(saved)
    facts = manifest.describe()
    assert (facts["step"], facts["run"], facts["validation_loss"], facts["bits_per_byte"]) == (500, "r-1", 1.47, 2.12)
    assert str(facts["created"]).endswith("+00:00")


def test_digests_without_a_manifest(saved: Path, sharded: Path) -> None:
    for folder in (saved, sharded):
        before = weights_digest(folder)
        (folder / "manifest.json").unlink()
        assert read_manifest(folder) is None
        assert weights_digest(folder) == before
    assert weights_digest(saved) != weights_digest(sharded)


def test_equal_weights_have_equal_digests(saved: Path, tmp_path: Path) -> None:
    assert save_model(tmp_path / "again", _make_model()).weights == weights_digest(saved)
    assert save_model(tmp_path / "other", _make_model(seed=1)).weights != weights_digest(saved)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"])
def test_every_changed_or_absent_file_is_found(saved: Path, name: str) -> None:
    content = bytearray((saved / name).read_bytes())
    (saved / name).write_bytes(bytes(content) + b" ")
    with pytest.raises(CheckpointError, match=name):
        load_model(saved)
    (saved / name).unlink()
    with pytest.raises(QuillError, match=name):
        load_model(saved)


def test_payload_damage_is_named_as_damage(saved: Path) -> None:
    """A flipped exponent bit makes infinities; the checksum explains that better than the finite check."""
    file = saved / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-64:] = b"\xff" * 64
    file.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match="sha256"):
        load_model(saved)
    with pytest.raises(CheckpointError, match="not finite"):
        load_model(saved, verify=False)


def test_files_that_the_manifest_does_not_know_are_not_weights(saved: Path) -> None:
    (saved / "README.md").write_text("a model card added later")
    load_model(saved)
    manifest = json.loads((saved / "manifest.json").read_text())
    del manifest["files"]["model.safetensors"]
    _edit_json(saved / "manifest.json", files=manifest["files"])
    with pytest.raises(CheckpointError, match=r"does not list model\.safetensors"):
        load_model(saved)


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 2}, {"version": None}, {"files": []}, {"files": {"../config.json": "0" * 64}},
        {"files": {"config.json": "xyz"}}, {"files": {"config.json": 1}}, {"weights": 3}, {"step": "many"},
        {"validation_loss": "low"},
    ],
)  # fmt: skip
def test_malformed_manifests_are_refused(saved: Path, changes: dict[str, object]) -> None:
    _edit_json(saved / "manifest.json", **changes)
    with pytest.raises(CheckpointError, match=r"manifest\.json: "):
        load_model(saved)


def test_shards(sharded: Path) -> None:
    shards = sorted(sharded.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert all(path.stat().st_size < 8_000 for path in shards)
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert _same_weights(load_model(sharded), _make_model())


def test_an_index_may_not_point_outside_the_folder(sharded: Path, tmp_path: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    first = next(iter(weight_map))
    shutil.copy(sharded / weight_map[first], tmp_path / "out.safetensors")
    for name in ("../out.safetensors", str(tmp_path / "out.safetensors"), "..", "a\0b.safetensors", "config.json", ""):
        _edit_json(index, weight_map=weight_map | {first: name})
        with pytest.raises(CheckpointError, match="weight_map must name safetensors files in the same folder"):
            load_model(sharded, verify=False)


def test_the_index_must_fit_the_shards(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    for changed, message in (
        ({}, "weight_map is empty"),
        (weight_map | {"x": "model-9.safetensors"}, "does not exist"),
        (weight_map | {"x": weight_map["transformer.wte.weight"]}, "does not list the tensors"),
    ):
        _edit_json(index, weight_map=changed)
        with pytest.raises(CheckpointError, match=message):
            load_model(sharded, verify=False)


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    shards = sorted(sharded.glob("model-*.safetensors"))
    shutil.copy(shards[0], shards[1])
    with pytest.raises(CheckpointError, match="another shard"):
        load_model(sharded, verify=False)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "consolidated.ckpt"])
def test_pickled_weights_are_never_read(saved: Path, name: str) -> None:
    (saved / "model.safetensors").rename(saved / name)
    with pytest.raises(CheckpointError, match=f"{name} but no model.safetensors"):
        load_model(saved, verify=False)


def test_folders_without_weights_are_named(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    (saved / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors"):
        load_model(saved)
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors"):
        weights_digest(saved)


def test_code_in_model_folders_is_refused(saved: Path) -> None:
    (saved / "modeling.py").write_text("raise SystemExit('executed')")
    _edit_json(saved / "config.json", auto_map={"AutoModelForCausalLM": "modeling.Model"})
    with pytest.raises(ConfigError, match="auto_map"):
        load_model(saved)


def test_sizes_are_checked_before_memory_is_taken(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _edit_json(saved / "config.json", vocab_size=2**24, n_positions=2**21)

    def refuse(*shape: object, **options: object) -> None:
        raise AssertionError("allocated")

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(CheckpointError, match=r"wte\.weight \[40, 16\] instead of \[16777216, 16\]"):
        load_model(saved, verify=False)


def test_saving_over_a_checkpoint_replaces_it(saved: Path) -> None:
    save_model(saved, _make_model(seed=1), provenance=Provenance(step=501))
    assert _same_weights(load_model(saved), _make_model(seed=1))
    assert not (saved / "tokenizer.json").exists()
    assert [path.name for path in saved.parent.iterdir()] == ["m"]


def test_a_writer_that_ended_between_two_renames_is_made_good(saved: Path) -> None:
    saved.rename(saved.with_name(".m.previous"))
    broken = _make_model()
    broken.embed_tokens.weight.data.fill_(float("inf"))
    with pytest.raises(CheckpointError, match="not finite"):
        save_model(saved, broken)
    assert _same_weights(load_model(saved), _make_model())


def test_wrapped_compiled_and_packed_models_are_refused(tmp_path: Path) -> None:
    model = _make_model()
    state = {f"_orig_mod.{name}": value for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"lacks embed_tokens\.weight.*neither compiled"):
        save_state_dict(tmp_path / "m", CONFIG, state, dtype=torch.float32)
    state = model.state_dict() | {"layers.1.mlp.up_proj.weight": torch.zeros(0, 16)}
    with pytest.raises(CheckpointError, match=r"misshapes layers\.1\.mlp\.up_proj\.weight"):
        save_state_dict(tmp_path / "m", CONFIG, state, dtype=torch.float32)
    assert list(tmp_path.iterdir()) == []


def test_saving_through_a_link_replaces_what_it_points_to(saved: Path) -> None:
    link = saved.parent / "last"
    link.symlink_to("m")
    save_model(link, _make_model(seed=1))
    assert link.is_symlink()
    assert _same_weights(load_model(saved), _make_model(seed=1))


def test_only_checkpoints_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        save_model(tmp_path / "home", _make_model())
    assert (tmp_path / "home" / "thesis.txt").exists()
    with pytest.raises(CheckpointError, match="is a file"):
        save_model(tmp_path / "home" / "thesis.txt", _make_model())
    (tmp_path / "empty").mkdir()
    save_model(tmp_path / "empty", _make_model())
    assert _same_weights(load_model(tmp_path / "empty"), _make_model())


def test_what_an_interrupted_save_left_is_removed(saved: Path) -> None:
    partial = saved.with_name(".m.partial")
    partial.mkdir()
    (partial / "config.json").write_text("half")
    save_model(saved, _make_model(seed=1))
    assert not partial.exists()
    assert _same_weights(load_model(saved), _make_model(seed=1))


def test_a_full_disk_leaves_the_old_checkpoint(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_model(saved, _make_model(seed=1))
    monkeypatch.undo()
    assert _same_weights(load_model(saved), _make_model())
    assert [path.name for path in saved.parent.iterdir()] == ["m"]


class _CutError(BaseException):
    """Not an Exception: nothing may catch it, as nothing catches a power cut."""


@pytest.mark.parametrize("exchange", [True, False])
def test_a_save_cut_off_at_any_step_leaves_a_whole_folder(
    saved: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    """Every file operation in turn is the last one. Without the exchange the old folder may lie beside its name."""
    old, new = _make_model(), _make_model(seed=1)
    if not exchange:
        monkeypatch.setattr(atomic_folder, "_exchange", lambda first, second: False)
    cuts = 0
    while not _finishes(lambda: save_model(saved, new), operations=cuts):
        cuts += 1
        there = exchange or saved.exists()
        model = load_model(saved if there else saved.with_name(".m.previous"))
        assert _same_weights(model, old) or _same_weights(model, new)
    assert cuts > 5
    assert _same_weights(load_model(saved), new)
    assert [path.name for path in saved.parent.iterdir()] == ["m"]


def _finishes(run: Callable[[], object], operations: int) -> bool:
    """Whether `run` ends when only so many file operations succeed."""

    def counted(operation: Callable[..., object]) -> Callable[..., object]:
        def limited(*arguments: object, **options: object) -> object:
            nonlocal operations
            if operations == 0:
                raise _CutError
            operations -= 1
            return operation(*arguments, **options)

        return limited

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", counted(os.fsync))
        for name in ("rename", "mkdir", "write_text"):
            patch.setattr(Path, name, counted(getattr(Path, name)))
        try:
            run()
        except _CutError:
            return False
    return True


WRITER = """
import sys
from pathlib import Path
from model.atomic_folder import replace_folder
target, number = Path(sys.argv[1]), 0
def write(folder):
    for name in ("config.json", "a", "b"):
        (folder / name).write_text(str(number) * 1000)
while True:
    number += 1
    replace_folder(target, write, marker="config.json")
    print(number, flush=True)
"""


def test_killed_writers_leave_whole_folders(tmp_path: Path) -> None:
    target = tmp_path / "t"
    chance = random.Random(0)
    for _ in range(6):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(target)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(chance.random() * 0.02)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        assert len({(target / name).read_text() for name in ("config.json", "a", "b")}) == 1
    replace_folder(target, lambda folder: None, marker="config.json")
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


WEIRD: list[object] = [
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, "", "x", "silu", "\ud800", [], [1], {},
    {"rope_type": "llama3"}, {"a": {"b": 1}}, [None], [[]], ["GPT2LMHeadModel"], "llama",
]  # fmt: skip
SOURCES = {
    "gpt2": CONFIG,
    "llama": create_config("llama-tiny", vocab_size=40, hidden_size=16, num_heads=2, num_kv_heads=1, num_layers=2),
}


@pytest.mark.parametrize("name", SOURCES)
def test_mutated_configurations_load_or_are_refused(name: str, tmp_path: Path) -> None:
    """Nothing but a QuillError ever comes out, and what does load agrees with its weights."""
    folder = tmp_path / "m"
    model = Transformer(SOURCES[name])
    model.init_weights()
    save_model(folder, model)
    original = json.loads((folder / "config.json").read_text())
    chance = random.Random(1)
    refused = 0
    for _ in range(250):
        values = dict(original)
        for key in chance.sample(sorted(original), chance.choice([1, 1, 2, 5])):
            if chance.random() < 0.15:
                del values[key]
            else:
                values[key] = chance.choice(WEIRD)
        (folder / "config.json").write_text(json.dumps(values))
        try:
            load_model(folder, verify=False)
        except QuillError:
            refused += 1
    assert 50 < refused < 250


def test_mutated_configuration_text_is_refused_or_read(saved: Path) -> None:
    original = (saved / "config.json").read_bytes()
    chance = random.Random(2)
    for _ in range(250):
        (saved / "config.json").write_bytes(_mutate(original, chance))
        try:
            load_model(saved, verify=False)
        except QuillError:
            continue


def test_mutated_weights_are_always_noticed_with_a_manifest(saved: Path) -> None:
    original = (saved / "model.safetensors").read_bytes()
    chance = random.Random(3)
    for _ in range(150):
        mutated = _mutate(original, chance)
        if mutated == original:
            continue
        (saved / "model.safetensors").write_bytes(mutated)
        with pytest.raises(CheckpointError):
            load_model(saved)


def test_mutated_weights_load_or_are_refused_without_one(saved: Path) -> None:
    original = (saved / "model.safetensors").read_bytes()
    header_end = 8 + int.from_bytes(original[:8], "little")
    chance = random.Random(4)
    refused = 0
    for number in range(300):
        limit = header_end if number % 3 else len(original)
        (saved / "model.safetensors").write_bytes(_mutate(original, chance, limit))
        try:
            model = load_model(saved, verify=False)
        except QuillError:
            refused += 1
        else:
            assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert refused > 100


def _mutate(content: bytes, chance: random.Random, limit: int | None = None) -> bytes:
    """Flip bytes below `limit`, or cut the end off, or repeat a piece."""
    limit = limit or len(content)
    kind = chance.random()
    if kind < 0.15:
        return content[: chance.randrange(limit)]
    if kind < 0.25:
        start = chance.randrange(limit)
        return content[:start] + content[start : start + 40] + content[start:]
    mutated = bytearray(content)
    for _ in range(chance.choice([1, 1, 3, 20])):
        mutated[chance.randrange(limit)] = chance.randrange(256)
    return bytes(mutated)


def test_manifests_are_made_of_what_lies_there(saved: Path) -> None:
    (saved / "manifest.json").write_text(manifest_json(make_manifest(saved, PROVENANCE)))
    load_model(saved)
