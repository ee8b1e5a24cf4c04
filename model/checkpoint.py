"""Model folders in Hugging Face's format: `save_model` writes them whole or not at all, `load_model` is strict.

A folder holds config.json, generation_config.json, model.safetensors (or shards and their index), the tokenizer's
files and manifest.json. Nothing in it is ever executed or unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from model.atomic_folder import replace_folder
from model.config import ModelConfig
from model.errors import CheckpointError
from model.hf import (
    FLOAT_TYPES,
    Entry,
    Shape,
    check_tensors,
    export_config,
    from_hf,
    resolve_names,
    tensor_table,
    to_hf,
)
from model.hf_config import CONFIG_FILE, GENERATION_CONFIG_FILE, config_to_hf, load_config
from model.hub import resolve_model
from model.manifest import (
    INDEX_FILE,
    MANIFEST_FILE,
    WEIGHTS_FILE,
    Manifest,
    Provenance,
    make_manifest,
    manifest_json,
    read_index,
    read_manifest,
    verify_files,
    weight_files,
)
from model.reference_logits import make_self_check
from model.self_check import SelfCheck
from model.transformer import Transformer

__all__ = ["Manifest", "Provenance", "load_config", "load_model", "read_manifest", "save_model", "save_state_dict"]

MAX_SHARD_BYTES = 5 * 10**9


class SavableTokenizer(Protocol):
    def save(self, folder: Path) -> None:
        """Write the tokenizer's files into the folder."""
        ...


def load_model(
    folder: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu", verify: bool = True
) -> Transformer:
    """The folder's model in eval mode, its weights in `dtype` (None: the file's own, the widest if they differ).

    A string may also be a model's name, which `resolve_model` fetches: "gpt2", "owner/name@revision".
    The weights are copied: the model does not depend on the files afterwards. `verify` compares every file with
    manifest.json where there is one; it runs beside the loading and costs little on a second core.
    Raises ConfigError or CheckpointError, before memory is taken for weights that do not fit the configuration, and
    HubError for a name that cannot be fetched.
    """
    folder = resolve_model(folder)
    config = load_config(folder)
    state = read_state_dict(folder, config, dtype=dtype, verify=verify)
    with without_weights():
        model = Transformer(config)
    model.load_state_dict({name: tensor.to(device) for name, tensor in state.items()}, assign=True)
    return model.eval()


def read_state_dict(
    folder: Path, config: ModelConfig, *, dtype: torch.dtype | None, verify: bool, extra: Sequence[Entry] = ()
) -> dict[str, Tensor]:
    """The folder's weights under our names: those of `Transformer(config)` and of the `extra` entries.

    Raises CheckpointError, before memory is taken for weights that do not fit the configuration.
    """
    manifest = read_manifest(folder) if verify else None
    with ThreadPoolExecutor(max_workers=1) as pool:
        verified = None if manifest is None else pool.submit(_verify, folder, manifest)
        try:
            state = _read_weights(folder, config, dtype, extra)
        except CheckpointError:
            _await(verified)  # a damaged file explains more than the damage found in it
            raise
        _await(verified)
    return state


@contextmanager
def without_weights() -> Iterator[None]:
    """Modules made here have shapes but no memory, until weights are assigned."""
    with _NoInitialisation(), torch.device("meta"):
        yield


class _NoInitialisation(TorchFunctionMode):
    """Skips nn.Embedding's random values: on the meta device they would import torch's compiler, for seconds."""

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return None if func is torch.nn.init.normal_ else func(*args, **(kwargs or {}))


def _verify(folder: Path, manifest: Manifest) -> None:
    for name in (CONFIG_FILE, *weight_files(folder)):
        if name not in manifest.files:
            raise CheckpointError(
                f"{folder / MANIFEST_FILE} does not list {name}; remove the file or save the model again"
            )
    verify_files(folder, manifest)


def _await(verified: Future[None] | None) -> None:
    if verified is not None:
        verified.result()


def _read_weights(
    folder: Path, config: ModelConfig, dtype: torch.dtype | None, extra: Sequence[Entry]
) -> dict[str, Tensor]:
    """Our state dict, checked against the configuration before anything is allocated."""
    with ExitStack() as stack:
        weights = _WeightFiles(folder, stack)
        names = resolve_names(config, weights.described)
        table = [*tensor_table(config), *extra]
        described = {name: weights.described[file_name] for name, file_name in names.items()}
        try:
            check_tensors(config, table, described)
            if dtype is None:
                dtype = _widest({described[part.name][1] for entry in table for part in entry.parts})
            state = {entry.parameter: from_hf(entry, lambda name: weights.read(names[name]), dtype) for entry in table}
            _check_tied_head(config, table, names, weights, state, dtype)
        except CheckpointError as problem:
            raise CheckpointError(f"{folder}: {problem}") from None
    return state


def _widest(types: set[str]) -> torch.dtype:
    result = FLOAT_TYPES[types.pop()]
    for name in types:
        result = torch.promote_types(result, FLOAT_TYPES[name])
    return result


def _check_tied_head(
    config: ModelConfig,
    table: list[Entry],
    names: dict[str, str],
    weights: _WeightFiles,
    state: dict[str, Tensor],
    dtype: torch.dtype,
) -> None:
    """Some writers save a tied head too; it must then be the embedding."""
    if not config.tie_word_embeddings or "lm_head.weight" not in names:
        return
    head = weights.read(names["lm_head.weight"]).to(dtype)
    if not torch.equal(head, state["embed_tokens.weight"]):
        raise CheckpointError("lm_head.weight differs from the embedding although config.json sets tie_word_embeddings")


class _WeightFiles:
    """The folder's safetensors files, open, as one set of tensors. Raises CheckpointError for damaged ones."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.described: dict[str, tuple[Shape, str]] = {}
        self._source: dict[str, safe_open] = {}
        for file_name in weight_files(folder):
            try:
                file = stack.enter_context(safe_open(folder / file_name, framework="pt"))
                self._add(file, file_name)
            except (SafetensorError, OSError) as problem:
                raise CheckpointError(f"{folder / file_name} is damaged ({problem}); copy it again") from problem
        if not (folder / WEIGHTS_FILE).exists() and set(read_index(folder)) != set(self.described):
            raise CheckpointError(
                f"{folder / INDEX_FILE} does not list the tensors that the shards hold; copy them again"
            )

    def _add(self, file: safe_open, file_name: str) -> None:
        for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
            if name in self.described:
                raise CheckpointError(f"{name} is in {file_name} and in another shard; copy the folder again")
            header = file.get_slice(name)
            self.described[name] = (tuple(header.get_shape()), header.get_dtype())
            self._source[name] = file

    def read(self, name: str) -> Tensor:
        """The tensor as a view of the mapped file."""
        return self._source[name].get_tensor(name)


def save_model(
    folder: str | Path,
    model: Transformer,
    *,
    tokenizer: SavableTokenizer | None = None,
    dtype: torch.dtype | None = None,
    provenance: Provenance | None = None,
    vocab_size: int | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Manifest:
    """`save_state_dict` of a model; `dtype` None keeps the model's own."""
    return save_state_dict(
        folder,
        model.config,
        model.state_dict(),
        dtype=dtype or model.dtype,
        tokenizer=tokenizer,
        provenance=provenance,
        vocab_size=vocab_size,
        max_shard_bytes=max_shard_bytes,
    )


def save_state_dict(
    folder: str | Path,
    config: ModelConfig,
    state: Mapping[str, Tensor],
    *,
    dtype: torch.dtype,
    tokenizer: SavableTokenizer | None = None,
    provenance: Provenance | None = None,
    vocab_size: int | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Manifest:
    """Write weights under our names as a folder that transformers loads, replacing a checkpoint folder of that name.

    `vocab_size` cuts padding rows off the vocabulary. The folder appears whole or not at all, and an older one stays
    until it does; one writer per folder. Returns the manifest written.
    Raises ConfigError if no Hugging Face class computes what this model computes, CheckpointError for weights that
    are incomplete or not finite, for a folder that is no checkpoint, and when the disk refuses.
    """
    exported = export_config(config, vocab_size)
    config_json = config_to_hf(exported, str(dtype).removeprefix("torch."))
    files = {CONFIG_FILE: config_json, GENERATION_CONFIG_FILE: _generation_config(config_json)}

    def self_check() -> SelfCheck | None:
        with without_weights():
            model = Transformer(config)
        return make_self_check(model, state, dtype=dtype, vocab_size=exported.vocab_size)

    return write_checkpoint(
        folder, files, lambda: dict(to_hf(config, exported, state, dtype)), tokenizer=tokenizer,
        provenance=provenance, max_shard_bytes=max_shard_bytes, self_check=self_check,
    )  # fmt: skip


def write_checkpoint(
    folder: str | Path,
    files: Mapping[str, dict[str, object]],
    tensors: Callable[[], dict[str, Tensor]],
    *,
    tokenizer: SavableTokenizer | None,
    provenance: Provenance | None,
    max_shard_bytes: int,
    self_check: Callable[[], SelfCheck | None] = lambda: None,
) -> Manifest:
    """A folder of JSON `files`, weights under their names in the file, the tokenizer and the manifest of them all.

    It appears whole or not at all. `self_check` is asked once `tensors` has let the weights pass, and what these took
    is free again. Raises what `tensors` raises, and CheckpointError as `save_state_dict` does.
    """
    written: list[Manifest] = []

    def write(target: Path) -> None:
        for name, content in files.items():
            _write_json(target / name, content)
        _write_weights(target, tensors(), max_shard_bytes)
        if tokenizer is not None:
            tokenizer.save(target)
        written.append(make_manifest(target, provenance, self_check()))
        (target / MANIFEST_FILE).write_text(manifest_json(written[0]))

    replace_folder(Path(folder), write, marker=CONFIG_FILE)
    return written[0]


def _generation_config(config_json: dict[str, object]) -> dict[str, object]:
    ids = {name: config_json[name] for name in ("bos_token_id", "eos_token_id") if config_json[name] is not None}
    return {"_from_model_config": True, **ids}


def _write_weights(folder: Path, tensors: dict[str, Tensor], max_shard_bytes: int) -> None:
    shards = _split(tensors, max_shard_bytes)
    if len(shards) == 1:
        _save_tensors(folder / WEIGHTS_FILE, tensors)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _save_tensors(folder / file_name, shard)
        weight_map |= dict.fromkeys(shard, file_name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """safetensors makes files that only their owner reads; ours follow the umask, as the rest of the folder does."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


def _split(tensors: dict[str, Tensor], max_bytes: int) -> list[dict[str, Tensor]]:
    """The tensors in order, in groups of at most `max_bytes`; a larger tensor gets a group of its own."""
    shards: list[dict[str, Tensor]] = [{}]
    used = 0
    for name, tensor in tensors.items():
        if shards[-1] and used + tensor.nbytes > max_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = tensor
        used += tensor.nbytes
    return shards


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
