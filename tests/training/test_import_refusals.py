"""What `import` refuses: each time one sentence that names the file or field, exit status 1, and nothing written."""

from __future__ import annotations

import datetime
import io
import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import CheckpointError, QuillError
from model.tokenizer import Tokenizer
from tests.training.conftest import Command
from tests.training.foreign_checkpoints import (
    CHARACTERS,
    litgpt_settings,
    litgpt_weights,
    llmc_bytes,
    make_gpt2,
    make_llama,
    nanogpt_content,
    write_litgpt,
)
from training.importers.convert import ImportRequest, import_model
from training.importers.torch_file import read_torch_file
from training.importers.yaml_file import read_yaml

COUNT = len(CHARACTERS)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "input.txt"
    path.write_text(CHARACTERS, encoding="utf-8")
    return path


@pytest.fixture
def content() -> dict[str, Any]:
    return nanogpt_content(make_gpt2(COUNT, "gelu"))


def refusal(source: Path, **options: Any) -> str:
    """The error's message, after checking that nothing lies where the model would have gone."""
    out = source.parent / "out"
    before = sorted(source.parent.iterdir())
    with pytest.raises(QuillError) as caught:
        import_model(ImportRequest(source, out, **options))
    assert sorted(source.parent.iterdir()) == before
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_command_reports_what_it_wrote(
    tmp_path: Path, text: Path, content: dict[str, Any], command: Command
) -> None:
    torch.save(content, tmp_path / "ckpt.pt")
    out = tmp_path / "out"
    status, printed, errors = command("import", tmp_path / "ckpt.pt", "--out", out, "--characters", text, "--json")
    assert (status, errors) == (0, "")
    values = json.loads(printed)
    assert (values["format"], values["vocab_size"], values["step"], values["dtype"]) == (
        "nanogpt",
        COUNT,
        20,
        "float32",
    )
    assert values["parameters"] == sum(
        tensor.numel() for name, tensor in content["model"].items() if name != "lm_head.weight"
    )
    status, printed, errors = command("import", tmp_path / "ckpt.pt", "--out", out, "--characters", text)
    assert (status, printed) == (1, "")
    assert errors == f"error: {out} is not empty; choose an empty or new folder for --out\n"


def test_a_missing_file_is_one_line_and_status_1(tmp_path: Path, command: Command) -> None:
    status, printed, errors = command("import", tmp_path / "no.pt", "--out", tmp_path / "out", "--json")
    assert (status, printed) == (1, "")
    assert errors.startswith(f"error: {tmp_path / 'no.pt'} does not exist")
    assert list(tmp_path.iterdir()) == []


def zip_of(path: Path, **members: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(f"x/{name.replace('_', '.')}", data)


def test_files_that_torch_did_not_write(tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    for data in (b"", b"\x7fELF", b"{}", b"\x80"):
        path.write_bytes(data)
        message = refusal(path)
        assert "is not a file that torch.save wrote" in message or "is damaged" in message
    zip_of(path, photo_jpg=b"\xff\xd8")
    assert "is a zip archive but not one of torch's" in refusal(path)
    zip_of(path, data_pkl=b"", constants_pkl=b"")
    assert "TorchScript" in refusal(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\x80\x02}." * 50)
    assert "was compressed" in refusal(path)
    path.write_bytes(b"")
    path.unlink()
    path.mkdir()
    assert "holds neither ckpt.pt nor lit_model.pth" in refusal(path)


def test_truncated_and_flipped_files(tmp_path: Path, content: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    whole, path = buffer.getvalue(), tmp_path / "ckpt.pt"
    for length in (4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert "truncated or damaged" in refusal(path)
    place = whole.index(content["model"]["transformer.wpe.weight"].numpy().tobytes()[:64])
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    assert "differs from its checksum" in refusal(path)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_damage_goes_unnoticed_or_ends_in_another_error(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    """Any changed bytes: read as before (unused bytes of the archive), or refused by name."""
    path = tmp_path_factory.getbasetemp() / "damaged.pt"
    weights = {"a": torch.arange(6.0), "b": torch.ones(2, 2)}
    buffer = io.BytesIO()
    torch.save(weights, buffer, _use_new_zipfile_serialization=data.draw(st.booleans()))
    changed = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(changed)
    try:
        found = read_torch_file(path)
    except CheckpointError as problem:
        found = str(problem)
    assert isinstance(found, dict) or str(path) in str(found)


class Planted:
    """What an attacker pickles: reading it would call `print`."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("reading this file ran code",)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("strange", [Planted(), datetime.date(2024, 1, 1)], ids=["code", "object"])
def test_objects_are_never_unpickled(
    zipped: bool, strange: object, tmp_path: Path, content: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ckpt.pt"
    torch.save(content | {"config": strange}, path, _use_new_zipfile_serialization=zipped)
    message = refusal(path)
    assert "holds Python objects beside tensors and plain values" in message
    assert "weights_only" not in message
    assert "ran code" not in capfd.readouterr().out


def change(content: dict[str, Any], **sizes: object) -> dict[str, Any]:
    return content | {"model_args": content["model_args"] | sizes}


def test_nanogpt_checkpoints_that_do_not_fit(tmp_path: Path, text: Path, content: dict[str, Any]) -> None:
    path, weights = tmp_path / "ckpt.pt", content["model"]

    def said(value: object) -> str:
        torch.save(value, path)
        return refusal(path, characters=text)

    assert "has no model and model_args" in said({"state_dict": weights})
    assert "has no model and model_args" in said([1, 2])
    assert "holds no weights by name" in said(content | {"model": {}})
    assert "transformer.wpe.weight is no tensor" in said(content | {"model": weights | {"transformer.wpe.weight": 3}})
    assert "model_args: n_layer is missing" in said(change(content, n_layer=None))
    assert "model_args: n_layer must be an integer between 1 and 1024" in said(change(content, n_layer=10**6))
    assert "model_args: n_embd must be a multiple of n_head" in said(change(content, n_head=5))
    assert "lacks the tensors transformer.h.3.ln_1.weight" in said(change(content, n_layer=4))
    assert "transformer.h.2.ln_1.weight" in said(change(content, n_layer=2))
    assert "transformer.wpe.weight [24, 24] instead of [25, 24]" in said(change(content, block_size=25))
    assert "transformer.h.0.ln_1.bias" in said(change(content, bias=False))
    untied = weights | {"lm_head.weight": weights["lm_head.weight"] + 1}
    assert "lm_head.weight differs from transformer.wte.weight" in said(content | {"model": untied})
    whole = {name: tensor.to(torch.int64) for name, tensor in weights.items()}
    assert "not dense float32" in said(content | {"model": whole})
    broken = weights | {"transformer.wpe.weight": weights["transformer.wpe.weight"] * torch.nan}
    assert "embed_positions.weight holds values that are not finite" in said(content | {"model": broken})


def test_a_tensor_that_claims_more_than_the_file_holds_is_not_expanded(tmp_path: Path, text: Path) -> None:
    content = nanogpt_content(make_gpt2(COUNT, "gelu"))
    width = 2**16
    shapes = {"n_layer": 1, "n_head": 1, "n_embd": width, "block_size": 2}
    one = torch.ones(1)
    rows = {
        "ln_1.weight": (width,), "attn.c_attn.weight": (3 * width, width), "attn.c_proj.weight": (width, width),
        "ln_2.weight": (width,), "mlp.c_fc.weight": (4 * width, width), "mlp.c_proj.weight": (width, 4 * width),
    }  # fmt: skip
    model = {f"transformer.h.0.{name}": one.expand(shape) for name, shape in rows.items()}
    model |= {"transformer.wte.weight": one.expand(COUNT, width), "transformer.wpe.weight": one.expand(2, width)}
    content["model"] = model | {"transformer.ln_f.weight": one.expand(width)}
    torch.save(change(content, bias=False, **shapes), tmp_path / "ckpt.pt")
    assert "is smaller than the tensors it describes" in refusal(tmp_path / "ckpt.pt", characters=text)


def test_vocabularies_that_do_not_fit(tmp_path: Path, content: dict[str, Any], text: Path) -> None:
    path = tmp_path / "ckpt.pt"
    torch.save(content, path)
    assert f"has a vocabulary of {COUNT}, which is not GPT-2's; give --characters" in refusal(path)
    assert f"the tokenizer has 50257 tokens but the model has {COUNT}" in refusal(path, tokenizer="gpt2")
    assert "neither gpt2 nor an existing path" in refusal(path, tokenizer="gpt3")
    assert "leave one of them out" in refusal(path, tokenizer="gpt2", characters=text)
    assert "cannot be read: No such file" in refusal(path, characters=tmp_path / "no.txt")

    def said(name: str, data: bytes) -> str:
        (tmp_path / name).write_bytes(data)
        return refusal(path, characters=tmp_path / name)

    assert f"has 3 characters but the model has {COUNT}" in said("short.txt", b"abc")
    assert "is empty" in said("empty.txt", b"")
    assert "is not UTF-8 text" in said("latin.txt", b"\xe9")
    assert "is pickle, which is never read" in said("meta.pkl", b"\x80\x04.")
    assert "is not valid JSON" in said("meta.json", b"{")
    assert "must hold a list of characters" in said("meta.json", b'{"vocab_size": 3}')
    assert "must map characters to ids" in said("meta.json", b'{"stoi": {"a": "0"}}')
    assert "must map characters to ids" in said("meta.json", b'{"itos": {"x": "a"}}')
    assert "names a character twice" in said("meta.json", b'["a", "a"]')
    assert "counted from 0 without gaps" in said("meta.json", b'{"stoi": {"a": 0, "b": 2}}')
    assert "must hold single characters" in said("meta.json", b'["a", "bc"]')
    assert "must hold single characters" in said("meta.json", b'["\\ud800"]')


def test_places_that_are_not_free(tmp_path: Path, content: dict[str, Any], text: Path) -> None:
    path = tmp_path / "ckpt.pt"
    torch.save(content, path)
    (tmp_path / "file").write_text("")
    for out, said in ((tmp_path, "is not empty"), (tmp_path / "file", "is a file")):
        with pytest.raises(CheckpointError, match=said):
            import_model(ImportRequest(path, out, characters=text))
    (tmp_path / "new").mkdir()
    import_model(ImportRequest(path, tmp_path / "new", characters=text))
    assert (tmp_path / "new" / "config.json").is_file()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("norm_class_name", "LayerNorm"), ("mlp_class_name", "GptNeoxMLP"), ("mlp_class_name", "LLaMAMoE"),
        ("parallel_residual", True), ("rotary_percentage", 0.25), ("rope_condense_ratio", 2),
        ("post_mlp_norm", True), ("scale_embeddings", True), ("final_logit_softcapping", 30.0),
        ("attention_scores_scalar", 99), ("lm_head_bias", True), ("latent_attention", {"q_lora_rank": 4}),
        ("rope_adjustments", {"factor": 4.0}), ("n_query_groups", 3), ("n_embd", 33), ("name", "Gemma-2b"),
        ("sliding_window_indices", [1, 0, 1]), ("block_size", 10**9), ("norm_eps", "tiny"), ("norm_qk_type", "olmo2"),
    ],
)  # fmt: skip
def test_litgpt_models_that_have_no_place_here(field: str, value: object, tmp_path: Path) -> None:
    model = make_llama()
    more = {"sliding_window_size": 4} if field == "sliding_window_indices" else {}
    more |= {"norm_qk": True} if field == "norm_qk_type" else {}
    folder = write_litgpt(tmp_path / "lit", litgpt_weights(model), litgpt_settings(model, **more) | {field: value})
    Tokenizer.characters(CHARACTERS).save(folder)
    message = refusal(folder)
    assert f"model_config.yaml: {field}" in message


def test_what_litgpt_leaves_out_has_litgpts_default(tmp_path: Path) -> None:
    model = make_llama()
    settings_ = litgpt_settings(model)
    del settings_["parallel_residual"]  # True there
    folder = write_litgpt(tmp_path / "lit", litgpt_weights(model), settings_)
    assert "parallel_residual is True" in refusal(folder)


def test_litgpt_folders_that_are_not_whole(tmp_path: Path) -> None:
    model = make_llama()
    folder = write_litgpt(tmp_path / "lit", litgpt_weights(model), litgpt_settings(model))
    assert "holds no tokenizer.json; copy it there or give --tokenizer" in refusal(folder)
    assert "is a file; give the folder that holds lit_model.pth" in refusal(
        folder / "model_config.yaml", format="litgpt"
    )
    Tokenizer.bytes().save(folder)
    assert "the tokenizer has 257 tokens but the model has 64" in refusal(folder)
    config = (folder / "model_config.yaml").read_text()
    (folder / "model_config.yaml").unlink()
    assert "model_config.yaml does not exist" in refusal(folder)
    (folder / "model_config.yaml").write_text(config + "x: [1\n")
    assert f"is not plain YAML (line {len(config.splitlines()) + 2})" in refusal(folder)
    (folder / "model_config.yaml").write_text(config)
    (folder / "lit_model.pth").unlink()
    assert "lit_model.pth does not exist" in refusal(folder, format="litgpt")
    (folder / "lit_model.pth").mkdir()
    assert "is a folder of shards" in refusal(folder)


def test_llmc_files_that_are_not_whole(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    whole = llmc_bytes(make_gpt2(60, "gelu_new"), 3, 64)

    def said(data: bytes, **options: Any) -> str:
        path.write_bytes(data)
        return refusal(path, **options)

    def with_header(index: int, value: int) -> bytes:
        return whole[: 4 * index] + struct.pack("<i", value) + whole[4 * index + 4 :]

    assert "the tokenizer has 50257 tokens but the model has 60" in said(whole, tokenizer="gpt2")
    assert f"has {len(whole) - 1} bytes where its header describes {len(whole)}" in said(whole[:-1])
    assert f"has {len(whole) + 4} bytes where" in said(whole + b"\0" * 4)
    assert "is truncated inside its header" in said(whole[:1000])
    assert "has version 4, and only 3 (float32) and 5 (bfloat16)" in said(with_header(1, 4))
    assert "num_layers is -1 but must lie between" in said(with_header(4, -1))
    assert "num_layers is 2000000000 but must lie between" in said(with_header(4, 2 * 10**9))
    assert "contradict each other" in said(with_header(7, 32))
    assert "contradict each other" in said(with_header(5, 7))
    for other in (20240520, 1):
        assert "does not begin with llm.c's magic number" in said(with_header(0, other), format="llmc")
    assert "is a file of llm.c's training state" in said(with_header(0, 20240527), format="llmc")
    assert "is not a file that torch.save wrote" in said(with_header(0, 20240520))


@pytest.mark.parametrize(
    "text",
    ["a", "a: [1", "- 1", "a: !!python/object:os.system 1", "a: *x", "a: 2020-13-45", "1: 2", "", "a: " + "[" * 5000,
     "a: \x00"],
    ids=repr,
)  # fmt: skip
def test_yaml_that_is_no_plain_settings_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "model_config.yaml"
    path.write_text(f"# settings\n{text}\n")
    with pytest.raises(CheckpointError, match=r"model_config\.yaml is not (plain YAML|a list of settings by name)"):
        read_yaml(path)
