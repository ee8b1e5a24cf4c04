"""Models by name: `gpt2`, `owner/name` or `owner/name@revision`, fetched once through huggingface_hub. Free of torch.

Only files that this package reads are fetched, by their exact names; pickled weights and code never are. The address,
the cache, offline mode and the token are huggingface_hub's own: HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE, HF_TOKEN.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from model.errors import CheckpointError, HubError
from model.manifest import INDEX_FILE, MANIFEST_FILE, REFUSED_WEIGHTS, WEIGHTS_FILE, weight_files

_CONFIG_FILE = "config.json"
_SMALL_FILES = frozenset(
    {
        _CONFIG_FILE, "generation_config.json", MANIFEST_FILE, "controls.json", "chat_template.jinja",
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    }
)  # fmt: skip
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
# The Hub's own rules for a name; a revision is a branch, a tag or a commit.
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_NAME = re.compile(rf"(?P<repo>(?:{_PART}/)?{_PART})(?:@(?P<revision>[A-Za-z0-9_][A-Za-z0-9_./-]{{0,199}}))?")
_DEFAULT_REVISION = "main"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HubName:
    """`repo` is `name` or `owner/name`; `revision` None is the repository's main branch."""

    repo: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubName | None:
        """None for what cannot be a model's name: a path, an address, two @ …"""
        match = _NAME.fullmatch(text)
        if match is None or ".." in text or "--" in match["repo"] or "//" in text or match["repo"].endswith(".git"):
            return None
        return cls(match["repo"], match["revision"])

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def resolve_model(name_or_path: str | Path, revision: str | None = None) -> Path:
    """The folder of a model: a Path or an existing folder itself, else the files of that name on the Hub.

    Files that are in the cache already are not fetched again, and without a connection the cache answers alone.
    The folder's own name is then the commit, which `pinned_name` shows and `name@commit` asks for again.
    Raises HubError for what is neither, or cannot be had, and CheckpointError for a repository without safetensors.
    """
    if revision is None and (isinstance(name_or_path, Path) or Path(name_or_path).is_dir()):
        return Path(name_or_path)
    name = _checked_name(str(name_or_path), revision)
    if importlib.util.find_spec("huggingface_hub") is None:
        raise HubError(f"{name} is no folder here; to fetch it by name, install the extra hub (huggingface_hub)")
    folder = _fetch(name)
    _log.info("%s is %s", name, pinned_name(name, folder))
    return folder


def pinned_name(name: HubName, folder: Path) -> str:
    """`owner/name@commit` of a folder that `resolve_model` gave for the name."""
    return f"{name.repo}@{folder.name}"


def _checked_name(text: str, revision: str | None) -> HubName:
    if revision is not None and "@" in text:
        raise HubError("revision is given twice, behind the @ of the name and by itself; leave one out")
    name = HubName.parse(text if revision is None else f"{text}@{revision}")
    if name is None:
        raise HubError(f"{text} is neither a folder nor a model's name such as openai-community/gpt2")
    return name


def _fetch(name: HubName) -> Path:
    """The snapshot's folder in the cache, complete. Raises HubError or CheckpointError."""
    from huggingface_hub import HfApi, errors, snapshot_download

    try:
        info = HfApi().model_info(name.repo, revision=name.revision)
        wanted = wanted_files((entry.rfilename for entry in info.siblings or ()), name)
        folder = _cached_folder(name)
        if folder is None or folder.name != info.sha or not all((folder / file).exists() for file in wanted):
            folder = Path(snapshot_download(name.repo, revision=name.revision, allow_patterns=wanted))
    except (CheckpointError, HubError):
        raise
    except errors.GatedRepoError:
        raise HubError(
            f"{name} asks its users to accept terms first; accept them on the Hub and set HF_TOKEN to a token of yours"
        ) from None
    except errors.RevisionNotFoundError:
        raise HubError(f"{name.repo} has no revision {name.revision}; name a branch, a tag or a commit of it") from None
    except errors.RepositoryNotFoundError:
        raise HubError(
            f"{name} is no folder here and no model on the Hub; check the name, and set HF_TOKEN for a private one"
        ) from None
    except Exception as problem:  # the classes for a failed connection differ between the library's versions
        return _cached(name, problem)
    return _complete(folder, name)


def wanted_files(files: Iterable[str], name: HubName) -> list[str]:
    """Which of a repository's files are fetched. Raises CheckpointError if none of them holds weights that are read."""
    present = set(files)
    weights = {WEIGHTS_FILE} & present
    if not weights and INDEX_FILE in present:
        weights = {INDEX_FILE} | {file for file in present if _SHARD.fullmatch(file)}
    if _CONFIG_FILE not in present:
        raise CheckpointError(f"{name} holds no {_CONFIG_FILE}; name a model in Hugging Face's format")
    if not weights:
        others = sorted(file for file in present if file.endswith(REFUSED_WEIGHTS) and "/" not in file)
        what = f"holds {others[0]} but no {WEIGHTS_FILE}" if others else f"holds no {WEIGHTS_FILE}"
        raise CheckpointError(f"{name} {what}; only safetensors is read, so name a revision that has it")
    return sorted(weights | (_SMALL_FILES & present))


def _cached(name: HubName, problem: Exception) -> Path:
    """What an earlier call has fetched, now that the Hub does not answer."""
    from huggingface_hub import constants

    folder = _cached_folder(name)
    reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _describe(problem)
    if folder is None:
        raise HubError(f"{name} is neither a folder here nor in the cache, and {reason}") from None
    if not constants.HF_HUB_OFFLINE:
        _log.warning("%s comes from the cache: %s", name, reason)
    return _complete(folder, name, reason)


def _cached_folder(name: HubName) -> Path | None:
    """Where the cache keeps that revision, whole or not; None if it has none of it."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name.repo, _CONFIG_FILE, revision=name.revision or _DEFAULT_REVISION)
    return Path(config).parent if isinstance(config, str) else None


def _describe(problem: Exception) -> str:
    """Without the problem's own text, which may hold addresses and what went with them."""
    response = getattr(problem, "response", None)
    status = getattr(response, "status_code", None)
    if status is not None:
        return f"the Hub answered with status {status}; try again later"
    strerror = getattr(problem, "strerror", None)
    if strerror:
        return f"the files could not be fetched ({strerror})"
    return f"the Hub cannot be reached ({type(problem).__name__}); check the connection and HF_ENDPOINT"


def _complete(folder: Path, name: HubName, reason: str = "the Hub gave no more") -> Path:
    """The folder, if no download was cut short in it. Raises HubError."""
    try:
        weight_files(folder)
        if (folder / _CONFIG_FILE).is_file():
            return folder
    except CheckpointError:
        pass
    raise HubError(f"{name} lies in the cache only in part, and {reason}")
