"""`python -m server --help` in groups: what pydantic-settings would print, by subject and without types of Python's."""

from __future__ import annotations

import shutil
import textwrap
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from server.settings import EngineSettings

GROUPS: dict[str, tuple[str, ...]] = {
    "Files": ("input", "output", "seed"),
    "Model": ("model", "served_model_name", "split", "shadow", "device", "dtype", "quantization", "strict_self_check"),
    "Engine": (
        "attention_backend",
        "num_threads",
        "max_num_seqs",
        "max_num_batched_tokens",
        "max_model_len",
        "kv_cache_memory",
        "block_size",
        "prefix_caching",
        "speculation",
        "deterministic",
    ),
    "Network": (
        "host",
        "port",
        "max_connections",
        "request_timeout",
        "keep_alive_timeout",
        "write_timeout",
        "ping_interval",
    ),
    "Reload": ("watch", "watch_text", "watch_tolerance", "watch_interval"),
    "Limits": ("max_queued_requests", "max_queued_tokens", "max_body_size"),
    "Security": ("api_key_file", "allowed_hosts", "cors_origins"),
    "Operations": (
        "health_timeout",
        "drain_delay",
        "drain_timeout",
        "log_level",
        "log_format",
        "otlp_endpoint",
        "request_history",
    ),
}
"""Settings by subject. One that is in no group is shown under "Further"."""
OTHERS = "Further"

_METAVARS: dict[str, str] = {
    "model": "FOLDER", "api_key_file": "FILE", "input": "FILE", "output": "FILE", "kv_cache_memory": "SIZE",
    "max_body_size": "SIZE", "served_model_name": "NAME", "allowed_hosts": "NAMES", "cors_origins": "ORIGINS",
    "host": "HOST", "attention_backend": "NAME", "otlp_endpoint": "URL", "watch_tolerance": "NATS",
    "split": "SPLIT", "shadow": "SHADOW",
}  # fmt: skip
_NAMES_OF_TYPES = {int: "N", float: "SECONDS", str: "TEXT", Path: "PATH"}
_INDENT = 26


def wants_help(argv: list[str]) -> bool:
    return "-h" in argv or "--help" in argv


def help_text(kind: type[EngineSettings], columns: int | None = None) -> str:
    """`columns` is the terminal's width unless it is given."""
    width = min(120, columns or shutil.get_terminal_size().columns)
    program = kind.model_config.get("cli_prog_name")
    about = " ".join((kind.__doc__ or "").split())
    parts = [f"usage: {program} [options]", textwrap.fill(about, width)]
    parts += [_group(name, fields, width) for name, fields in grouped(kind).items()]
    parts.append(
        textwrap.fill(
            "Every option is an environment variable as well: --kv-cache-memory is QUILL_KV_CACHE_MEMORY. The command"
            " line wins.",
            width,
        )
    )
    return "\n\n".join(parts)


def grouped(kind: type[EngineSettings]) -> dict[str, dict[str, FieldInfo]]:
    """The settings' fields by group, each in one; groups without a field are left out."""
    fields = dict(kind.model_fields)
    groups = {name: {field: fields.pop(field) for field in names if field in fields} for name, names in GROUPS.items()}
    return {name: group for name, group in {**groups, OTHERS: fields}.items() if group}


def _group(name: str, fields: dict[str, FieldInfo], width: int) -> str:
    return "\n".join([f"{name}:", *(_option(field, info, width) for field, info in fields.items())])


def _option(name: str, info: FieldInfo, width: int) -> str:
    flag = f"  --{name.replace('_', '-')}"
    if info.annotation is bool:
        flag = f"  --[no-]{name.replace('_', '-')}" if info.default else flag
    else:
        flag += f" {_metavar(name, info)}"
    text = f"{info.description or ''}{_default(info)}"
    margin = " " * _INDENT
    lines = textwrap.wrap(text, max(30, width), initial_indent=margin, subsequent_indent=margin, break_on_hyphens=False)
    if len(flag) + 2 > _INDENT:
        return "\n".join([flag, *lines])
    return "\n".join([flag.ljust(_INDENT) + lines[0].lstrip(), *lines[1:]]) if lines else flag


def _metavar(name: str, info: FieldInfo) -> str:
    if name in _METAVARS:
        return _METAVARS[name]
    choices = [
        choice for kind in _alternatives(info.annotation) if get_origin(kind) is Literal for choice in get_args(kind)
    ]
    if choices:
        return f"{{{','.join(map(str, choices))}}}"
    return next((_NAMES_OF_TYPES[kind] for kind in _alternatives(info.annotation) if kind in _NAMES_OF_TYPES), "VALUE")


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return " (required)"
    if info.default is None or info.default == [] or isinstance(info.default, bool):
        return ""
    return f" (default: {_shown(info.default)})"


def _shown(value: object) -> str:
    """Whole mebibytes as the command line takes them."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int) and value >= 1 << 20 and value % (1 << 20) == 0:
        return f"{value >> 20}MiB"
    return str(value)
