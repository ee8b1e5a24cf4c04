"""manifest.json: what a checkpoint folder holds (sha256 of every file) and where its weights come from.

Free of torch. A folder without a manifest is as good as any other; a folder with one must agree with it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from model.errors import CheckpointError
from model.json_file import JsonFields, read_json_object
from model.self_check import SelfCheck, self_check_from_json

MANIFEST_FILE = "manifest.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_VERSION = 1
_SHA256 = re.compile(r"[0-9a-f]{64}")
REFUSED_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf")


@dataclass(frozen=True, slots=True)
class Provenance:
    """The training behind some weights. `validation_loss` is in nats per token; `data` is a digest of the data, and
    `parent` that of the weights that training started from."""

    step: int | None = None
    run: str | None = None
    data: str | None = None
    validation_loss: float | None = None
    bits_per_byte: float | None = None
    parent: str | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """`files` maps file names to sha256 in hex; `weights` is the digest of `weights_digest`; `created` is ISO 8601.
    `self_check` has logits by which an engine can tell that it computes this model; folders of others have none."""

    files: Mapping[str, str]
    weights: str
    created: str
    provenance: Provenance = field(default_factory=Provenance)
    self_check: SelfCheck | None = None

    def describe(self) -> dict[str, object]:
        """Weights digest, time and training facts as plain values, without what is unknown."""
        facts = {"weights": self.weights, "created": self.created, **asdict(self.provenance)}
        return {name: value for name, value in facts.items() if value is not None}


def read_manifest(folder: str | Path) -> Manifest | None:
    """The folder's manifest, or None if it has none. Raises CheckpointError for a malformed one."""
    path = Path(folder) / MANIFEST_FILE
    if not path.exists():
        return None
    fields = JsonFields(read_json_object(path, CheckpointError), MANIFEST_FILE, CheckpointError)
    if fields.integer("version") != _VERSION:
        fields.fail("version", f"must be {_VERSION}")
    files = fields.string_map("files")
    for name, digest in files.items():
        if not is_plain_name(name) or not _SHA256.fullmatch(digest):
            fields.fail("files", "must map names of files in the folder to their sha256")
    provenance = Provenance(
        step=fields.optional_integer("step"),
        run=fields.optional_string("run"),
        data=fields.optional_string("data"),
        validation_loss=fields.optional_number("validation_loss"),
        bits_per_byte=fields.optional_number("bits_per_byte"),
        parent=fields.optional_string("parent"),
    )
    check = self_check_from_json(fields, MANIFEST_FILE)
    return Manifest(files, fields.string("weights"), fields.string("created"), provenance, check)


def make_manifest(folder: Path, provenance: Provenance | None, self_check: SelfCheck | None = None) -> Manifest:
    """A manifest of the files that lie in the folder now."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != MANIFEST_FILE)
    files = hash_files(folder, names)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return Manifest(files, _combine(files, weight_files(folder)), created, provenance or Provenance(), self_check)


def manifest_json(manifest: Manifest) -> str:
    content = {"version": _VERSION, **manifest.describe(), "files": dict(manifest.files)}
    if manifest.self_check is not None:
        content["self_check"] = manifest.self_check.values()
    return json.dumps(content, indent=2) + "\n"


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Raise CheckpointError, naming the file, unless every file of the manifest is there with its sha256."""
    for name in manifest.files:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is listed in {MANIFEST_FILE} but does not exist; copy it again")
    for name, digest in hash_files(folder, manifest.files).items():
        if digest != manifest.files[name]:
            raise CheckpointError(f"{folder / name} differs from its sha256 in {MANIFEST_FILE}; copy it again")


def weights_digest(folder: str | Path) -> str:
    """ "sha256:…" of the weights: from the manifest, or computed from the files where there is none.

    For a single file it is that file's sha256; for shards, the sha256 of their lines as sha256sum prints them.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest is not None:
        return manifest.weights
    names = weight_files(folder)
    return _combine(hash_files(folder, names), names)


def weight_files(folder: Path) -> list[str]:
    """Names of the folder's weight files: model.safetensors, or the shards that the index lists.

    Raises CheckpointError if there are none (saying so when there are others, which are never read), and for an
    index that points outside the folder.
    """
    if (folder / WEIGHTS_FILE).exists():
        return [WEIGHTS_FILE]
    if (folder / INDEX_FILE).exists():
        return sorted(set(read_index(folder).values()))
    others = [path.name for path in folder.iterdir() if path.suffix in REFUSED_WEIGHTS] if folder.is_dir() else []
    if others:
        raise CheckpointError(
            f"{folder} holds {min(others)} but no {WEIGHTS_FILE}; only safetensors is read, so convert it first"
        )
    raise CheckpointError(f"{folder} holds no {WEIGHTS_FILE}; give a model folder in Hugging Face's format")


def read_index(folder: Path) -> dict[str, str]:
    """{tensor name: shard file} from the index of a sharded checkpoint; the shards exist."""
    fields = JsonFields(read_json_object(folder / INDEX_FILE, CheckpointError), INDEX_FILE, CheckpointError)
    weight_map = fields.string_map("weight_map")
    if not weight_map:
        fields.fail("weight_map", "is empty")
    for name in set(weight_map.values()):
        if not is_plain_name(name) or not name.endswith(".safetensors"):
            fields.fail("weight_map", "must name safetensors files in the same folder")
        if not (folder / name).is_file():
            fields.fail("weight_map", f"names {name}, which does not exist; copy the missing shard")
    return weight_map


def hash_files(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """{name: sha256 in hex}, files in parallel: hashing leaves the interpreter lock alone."""
    names = list(names)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(lambda name: _sha256(folder / name), names), strict=True))


def is_plain_name(name: str) -> bool:
    """Whether a name read from a file can only mean a file in the same folder."""
    return name not in ("", ".", "..") and not set(name) & set("/\\\0")


def file_sha256(path: Path) -> str:
    """In hex. Raises OSError."""
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as problem:
        raise CheckpointError(f"{path} cannot be read: {problem.strerror}") from problem


def _combine(files: Mapping[str, str], names: list[str]) -> str:
    if len(names) == 1:
        return f"sha256:{files[names[0]]}"
    lines = "".join(f"{files[name]}  {name}\n" for name in sorted(names))
    return f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"
