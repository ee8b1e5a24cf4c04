"""Settings: one model for the command line and for QUILL_… environment variables (the command line wins)."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, ByteSize, Field, TypeAdapter, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict, SettingsError

from model.errors import QuillError
from model.hub import HubName, pinned_name, resolve_model
from server.engine.config import EngineConfig, ModelSource
from server.splits import Shadow, Split, parse_shadows, parse_splits
from server.watch import first_checkpoint

BUNDLED_MODEL = "shakespeare"
MIB = 1 << 20
MAX_SIZE = 1 << 50  # a slip of the unit is told at once, not as an allocation that fails

_SIZE = TypeAdapter(ByteSize)


class UsageError(Exception):
    """A mistake in the command line, the environment or the files they name; one sentence for the operator."""


def _split(value: object) -> object:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _bytes(value: object) -> int:
    """A size with or without a unit, as plain bytes."""
    try:
        size = int(_SIZE.validate_python(value))
    except ValidationError:
        size = 0
    if not 1 <= size <= MAX_SIZE:
        raise ValueError("must be a size above zero and up to 1PiB, such as 512MiB or 2GiB")
    return size


Names = Annotated[list[str], NoDecode, BeforeValidator(_split)]
ServedName = Annotated[str, Field(min_length=1, max_length=200)]
Size = Annotated[int, BeforeValidator(_bytes)]


class EngineSettings(BaseSettings):
    """The model and how its engine runs, whatever the requests come from. Sizes take units (`2GiB`)."""

    model_config = SettingsConfigDict(
        env_prefix="QUILL_",
        cli_prog_name="python -m server",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        cli_exit_on_error=False,
        frozen=True,
    )

    model: Annotated[list[Path], NoDecode, BeforeValidator(_split)] = Field(
        default=[],
        description="checkpoint folder, or a name on the Hub; may be repeated; without it the bundled one is served",
    )
    served_model_name: Annotated[list[ServedName], NoDecode, BeforeValidator(_split)] = Field(
        default=[], description="the models' names, in their order; default: the folder's name, or that on the Hub"
    )

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the model runs")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="the weights' precision")
    quantization: Literal["none", "int8"] = Field("none", description="weight quantisation")
    attention_backend: str = Field("auto", description="attention kernels")
    deterministic: bool = Field(
        False, description="refuse to start where tokens depend on other requests; slower on CUDA"
    )
    strict_self_check: bool = Field(
        False, description="refuse to start with a model that does not compute what was stored with its weights"
    )
    num_threads: int | None = Field(
        None, ge=1, le=1024, description="threads on the CPU; default: by the model and the cores"
    )
    max_model_len: int | None = Field(
        None, ge=1, description="tokens of a request, prompt and answer; default: the model's context"
    )
    max_num_seqs: int | None = Field(None, ge=1, le=16_384, description="sequences that run at once")
    max_num_batched_tokens: int | None = Field(None, ge=1, le=1 << 22, description="tokens in one step")
    kv_cache_memory: Size | None = Field(None, description="memory for the KV cache, such as 2GiB")
    block_size: int = Field(16, ge=1, le=1024, description="tokens in a KV block")
    speculation: bool = Field(True, description="on the CPU, compute guesses at a text's repetitions; same tokens")
    prefix_caching: bool = Field(True, description="reuse the KV blocks of equal prefixes")

    @property
    def model_paths(self) -> list[Path]:
        return self.model or [bundled_model_path()]

    @property
    def model_names(self) -> list[str]:
        """The names that clients use, in the order of the paths."""
        names = [path.resolve().name or BUNDLED_MODEL for path in self.model_paths]
        return [*self.served_model_name, *names[len(self.served_model_name) :]]

    @property
    def model_path(self) -> Path:
        """The first model's, which answers requests that name none."""
        return self.model_paths[0]

    @property
    def model_name(self) -> str:
        return self.model_names[0]

    def engine_config(self) -> EngineConfig:
        sources = [ModelSource(str(path), name) for path, name in zip(self.model_paths, self.model_names, strict=True)]
        return EngineConfig(
            model_path=str(self.model_path),
            model_name=self.model_name,
            device=self.device,
            dtype=self.dtype,
            quantization=self.quantization,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            kv_cache_memory=self.kv_cache_memory,
            block_size=self.block_size,
            prefix_caching=self.prefix_caching,
            attention_backend=self.attention_backend,
            num_threads=self.num_threads,
            speculation=self.speculation,
            deterministic=self.deterministic,
            strict_self_check=self.strict_self_check,
            further_models=tuple(sources[1:]),
        )


class Settings(EngineSettings):
    """Serve a model over HTTP; `python -m server batch` answers a file of requests. Lists take commas or repeated
    options."""

    host: str = Field("127.0.0.1", min_length=1, description="address to listen on")
    port: int = Field(8000, ge=0, le=65_535, description="port to listen on; 0 picks a free one")
    max_queued_requests: int = Field(256, ge=1, description="sequences that may wait before clients get 429")
    max_queued_tokens: int | None = Field(
        None, ge=1, description="tokens, of prompts and answers, that may wait before clients get 429; default: any"
    )
    request_history: int = Field(
        0, ge=0, le=100_000, description="requests kept in memory for GET /requests/{id}, with their prompts' tokens"
    )

    split: Names = Field(default=[], description="a name that several models answer: NAME=MODEL:WEIGHT,MODEL:WEIGHT")
    shadow: Names = Field(default=[], description="score a share of a model's answers: MODEL=CANDIDATE:FRACTION")

    watch: Path | None = Field(
        None,
        description="training run or folder of models, whose newest checkpoint replaces the first model if no worse",
    )
    watch_text: Path | None = Field(
        None, description="text to compare checkpoints by; default: the run's held-out data, or a few lines of ours"
    )
    watch_tolerance: float = Field(
        0.01, ge=0, le=100, description="nats per token by which a newer checkpoint may be worse"
    )
    watch_interval: float = Field(2.0, ge=0.05, le=3600, description="seconds between two looks at the watched folder")

    api_key_file: Path | None = Field(None, description="file with one API key a line; # starts a comment")
    allowed_hosts: Names = Field(default=[], description="further Host names to answer for; * for any")
    cors_origins: Names = Field(default=[], description="browser origins to allow; none by default")
    max_body_size: Size = Field(MIB, description="largest request body")
    max_connections: int = Field(4096, ge=1, description="open connections")
    request_timeout: float = Field(15.0, gt=0, le=3600, description="seconds a request may take to arrive")
    keep_alive_timeout: float = Field(30.0, gt=0, le=3600, description="seconds an idle connection stays open")
    write_timeout: float = Field(60.0, gt=0, le=86_400, description="seconds a client may leave its stream unread")
    ping_interval: float = Field(15.0, gt=0, le=3600, description="seconds of silence before a stream gets a ping")
    health_timeout: float = Field(15.0, gt=0, description="seconds of engine silence before /health gives 503")

    drain_delay: float = Field(0.0, ge=0, le=3600, description="least seconds between SIGTERM and the end of listening")
    drain_timeout: float = Field(30.0, ge=0, le=86_400, description="seconds that running requests get to finish")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severity to log")
    log_format: Literal["text", "json"] = Field("text", description="form of the log lines")
    otlp_endpoint: str | None = Field(
        None,
        pattern=r"^https?://[^\s/?#]+(/[^\s?#]*)?$",
        description="OpenTelemetry collector that gets spans, by HTTP",
    )

    @property
    def splits(self) -> dict[str, Split]:
        """By name. Raises ValueError with a sentence."""
        return parse_splits(self.split, self.model_names)

    @property
    def shadows(self) -> dict[str, Shadow]:
        """By the model whose answers are scored. Raises ValueError with a sentence."""
        return parse_shadows(self.shadow, self.model_names)

    def engine_config(self) -> EngineConfig:
        return replace(super().engine_config(), trace_requests=self.request_history > 0)


AnySettings = TypeVar("AnySettings", bound=EngineSettings)


def bundled_model_path() -> Path:
    """The checkpoint that ships inside the model package."""
    spec = importlib.util.find_spec("model")
    origin = spec.origin if spec is not None else None
    assert origin is not None, "the model package is part of this project"
    return Path(origin).parent / "data" / BUNDLED_MODEL


def load_settings(argv: list[str]) -> Settings:
    """The server's settings from the command line and the environment. Raises UsageError with one sentence."""
    return parse_settings(Settings, argv)


def follow_watched(settings: Settings) -> Settings:
    """Where no model is given, a watched folder's, under the folder's name. Raises UsageError."""
    watch = settings.watch
    if watch is None:
        return settings
    if not watch.is_dir():
        raise UsageError(f"--watch: {watch} is no folder; give a training run or a folder of model folders")
    if settings.model:
        return settings
    folder = first_checkpoint(watch)
    if folder is None:
        raise UsageError(f"--watch: {watch} holds no checkpoint yet; say by --model what to serve until it does")
    names = settings.served_model_name or [watch.resolve().name]
    return settings.model_copy(update={"model": [folder], "served_model_name": names})


def parse_settings(kind: type[AnySettings], argv: list[str]) -> AnySettings:
    """Settings of any kind. Raises UsageError, for a model folder that is none too."""
    make: Any = kind
    try:
        settings: AnySettings = make(_cli_parse_args=argv)
    except ValidationError as error:
        raise UsageError(_sentence(error)) from None
    except SettingsError as error:
        raise UsageError(str(error).removeprefix("error parsing CLI: ")) from None
    for folder in settings.model_paths:
        _check_model_folder(folder)
    return settings


def resolve_model_names(settings: AnySettings) -> AnySettings:
    """The settings with folders in place of names on the Hub, fetched where the cache lacks them, with a progress bar.

    Clients keep using the names. Raises UsageError, for names that two models share too.
    """
    given = len(settings.served_model_name)
    if given > len(settings.model_paths):
        raise UsageError(f"--served-model-name: gives {given} names for {len(settings.model_paths)} models")
    paths, names = [], list(settings.model_names)
    for index, path in enumerate(settings.model_paths):
        name = None if path.exists() else HubName.parse(str(path))
        paths.append(path if name is None else _fetch(name, path))
        if name is not None and index >= given:
            names[index] = name.repo
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"--served-model-name: two models are called {twice}; give each a name of its own")
    return settings.model_copy(update={"model": paths, "served_model_name": names})


def _fetch(name: HubName, path: Path) -> Path:
    try:
        folder = resolve_model(str(path))
    except QuillError as error:
        raise UsageError(f"--model: {error}") from None
    print(f"quill: {name} is {pinned_name(name, folder)}", file=sys.stderr)
    return folder


def check_aliases(settings: Settings) -> None:
    """Raises UsageError for a split or a shadow that cannot be."""
    for option in ("split", "shadow"):
        try:
            _ = settings.splits if option == "split" else settings.shadows
        except ValueError as error:
            raise UsageError(f"--{option} (QUILL_{option.upper()}): {error}") from None


def _sentence(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    name = str(first["loc"][0]) if first["loc"] else "settings"
    message = "must be given" if first["type"] == "missing" else first["msg"].removeprefix("Value error, ")
    return f"--{name.replace('_', '-')} (QUILL_{name.upper()}): {message[:1].lower()}{message[1:]}"


def _check_model_folder(folder: Path) -> None:
    try:
        is_name = not folder.exists() and HubName.parse(str(folder)) is not None
        problem = None if is_name else _folder_problem(folder)
    except OSError as error:
        problem = f"cannot be read ({error.strerror}); give a folder that this user may enter"
    if problem is not None:
        raise UsageError(f"--model: {folder} {problem}")


def _folder_problem(folder: Path) -> str | None:
    """What makes it no checkpoint folder at first sight. Raises OSError where it cannot be looked at."""
    if not folder.exists():
        return "does not exist; give the folder of a checkpoint, or a name on the Hub such as openai-community/gpt2"
    if not folder.is_dir():
        return "is not a folder; give the folder that holds config.json"
    if not (folder / "config.json").is_file():
        return "holds no config.json; give a Hugging Face checkpoint folder"
    return None
