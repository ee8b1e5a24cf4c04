"""Reading JSON that others wrote: every value is checked for its type, and each error names the file and the field.

Free of torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from model.errors import QuillError

MAX_JSON_BYTES = 64 * 2**20  # an index of a very large model has some 100,000 entries


def read_json_object(path: Path, error: type[QuillError]) -> dict[str, object]:
    """The object in a JSON file. Raises `error` for an absent, oversized or malformed file, and for NaN or infinity."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise error(f"{path} is larger than {MAX_JSON_BYTES} bytes; use the file that belongs to this model")
        value = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise error(f"{path} does not exist; give a folder in Hugging Face's format") from None
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror}") from problem
    except (ValueError, RecursionError) as problem:
        raise error(f"{path} is not valid JSON; restore it from its source") from problem
    if not isinstance(value, dict):
        raise error(f"{path} must hold a JSON object")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


class JsonFields:
    """Typed access to a JSON object. `null` counts as absent; without a default an absent field is an error."""

    def __init__(self, values: Mapping[str, object], source: str, error: type[QuillError]) -> None:
        self._values = values
        self._source = source
        self._error = error

    def __contains__(self, name: str) -> bool:
        """Whether the field is there, be it null."""
        return name in self._values

    def has(self, name: str) -> bool:
        return self._values.get(name) is not None

    def fail(self, name: str, rule: str) -> NoReturn:
        raise self._error(f"{self._source}: {name} {rule}")

    def value(self, name: str) -> object:
        """The value as it is; `null` and absent are both None."""
        return self._values.get(name)

    def integer(self, name: str, default: int | None = None, *, minimum: int = 0, maximum: int = 2**31 - 1) -> int:
        value = self._present(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            self.fail(name, f"must be an integer between {minimum} and {maximum}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._present(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not _is_finite(value):
            self.fail(name, "must be a finite number")
        return float(value)

    def optional_number(self, name: str) -> float | None:
        return self.number(name) if self.has(name) else None

    def optional_integer(self, name: str) -> int | None:
        return self.integer(name, maximum=2**63 - 1) if self.has(name) else None

    def boolean(self, name: str, default: bool) -> bool:
        value = self._present(name, default)
        if not isinstance(value, bool):
            self.fail(name, "must be true or false")
        return value

    def string(self, name: str, default: str | None = None) -> str:
        value = self._present(name, default)
        if not isinstance(value, str):
            self.fail(name, "must be a string")
        return value

    def optional_string(self, name: str) -> str | None:
        return self.string(name) if self.has(name) else None

    def mapping(self, name: str) -> dict[str, object]:
        value = self._present(name, None)
        if not isinstance(value, dict):
            self.fail(name, "must be an object")
        return value

    def string_map(self, name: str) -> dict[str, str]:
        value = self.mapping(name)
        if not all(isinstance(item, str) for item in value.values()):
            self.fail(name, "must map names to strings")
        return {key: str(item) for key, item in value.items()}

    def _present(self, name: str, default: object) -> object:
        value = self._values.get(name)
        if value is None:
            value = default
        if value is None:
            self.fail(name, "is missing")
        return value


def _is_finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the range of a float
        return False
