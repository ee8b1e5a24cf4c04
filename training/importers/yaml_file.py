"""A settings file in YAML, read without constructing anything but plain values."""

from __future__ import annotations

from pathlib import Path

import yaml

from model.errors import CheckpointError

_MAX_BYTES = 1 << 20


def read_yaml(path: Path) -> dict[str, object]:
    """The mapping in the file. Raises CheckpointError for what is absent, no YAML, or no mapping by names."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise CheckpointError(f"{path} is larger than {_MAX_BYTES} bytes; use the file that belongs to this model")
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; copy it from where the model was trained") from None
    except (OSError, UnicodeDecodeError):
        raise CheckpointError(f"{path} cannot be read as UTF-8 text; copy it again") from None
    except (yaml.YAMLError, ValueError, RecursionError) as problem:  # ValueError: a date that is none
        line = getattr(getattr(problem, "problem_mark", None), "line", None)
        where = "" if line is None else f" (line {line + 1})"
        raise CheckpointError(f"{path} is not plain YAML{where}; copy it from where the model was trained") from None
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise CheckpointError(f"{path} is not a list of settings by name; copy it from where the model was trained")
    return values
