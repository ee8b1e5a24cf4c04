"""The text that checkpoints are compared by: the operator's, the run's own held-out data, or a few lines of ours.

Free of torch.
"""

from __future__ import annotations

import array
import json
import sys
import tomllib
from pathlib import Path

from model.errors import TokenizerError
from model.json_file import MAX_JSON_BYTES
from model.manifest import is_plain_name
from model.tokenizer import Tokenizer
from server.reload_gate import Sample

WINDOW = 128
"""Tokens that are predicted in one piece: little beside a prompt, so that the live model can be measured while it
answers."""
_MOST_WINDOWS = 48
_MOST_BYTES = 1 << 20
_CANARY_TOKENS = 16
_ID_BYTES = {"uint16": ("H", 2), "uint32": ("I", 4)}

BUILT_IN = """\
The harbour was quiet when the last boat came in. An old man stood on the stones, waiting with a lamp, and counted \
the sails as he had done every evening for thirty years. "You are late," he said. "The wind turned," answered the \
boy, and threw him the rope. They tied the boat, carried the baskets up the hill, and spoke of small things: the \
price of salt, a broken net, a letter that had not come. Behind them the sea grew dark. In the kitchen there was \
bread, and soup, and a chair by the fire for each of them. What should I tell your mother? the old man asked. Tell \
her that I shall be home before the winter, said the boy, and that nothing is wrong.
"""


class WatchError(Exception):
    """Nothing can be compared, and so nothing is reloaded; one sentence for the operator."""


def make_sample(root: Path, text_file: Path | None, tokenizer: Tokenizer, context: int) -> Sample:
    """`text_file` if it is given, or the held-out data of the run in the folder `root`, or our own lines.

    Raises WatchError for a text that this tokenizer cannot read, or that has too few tokens.
    """
    if text_file is not None:
        ids = _encode(_read_text(text_file), tokenizer, f"--watch-text: {text_file}")
    else:
        ids = _held_out_of_run(root, tokenizer) or _encode(BUILT_IN, tokenizer, "the built-in text")
    size = min(WINDOW, context)
    windows = [ids[start : start + size + 1] for start in range(0, len(ids) - 1, size)][:_MOST_WINDOWS]
    windows = [window for window in windows if len(window) > 1]
    if not windows:
        raise WatchError("--watch-text: gives fewer than two tokens; give a longer text")
    return Sample(windows, windows[0][: min(_CANARY_TOKENS, max(1, context // 2))])


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_MOST_BYTES).decode("utf-8", "ignore")  # a character may be cut at the end
    except OSError as error:
        raise WatchError(f"--watch-text: {path} cannot be read: {error.strerror}") from None


def _encode(text: str, tokenizer: Tokenizer, what: str) -> list[int]:
    try:
        return tokenizer.encode(text, add_special=False)
    except TokenizerError as error:
        raise WatchError(f"{what} does not fit the model's tokenizer ({error}); give another by --watch-text") from None


def _held_out_of_run(root: Path, tokenizer: Tokenizer) -> list[int]:
    """The first held-out tokens of the data that a training run names in its config.toml; none where that is not to
    be had, for a run may be watched from a machine that has no data."""
    try:
        data = Path(tomllib.loads((root / "config.toml").read_text())["data"]["dir"])
        path = data / "manifest.json"
        if path.stat().st_size > MAX_JSON_BYTES:
            return []
        manifest = json.loads(path.read_bytes())
        if manifest["tokenizer_digest"] != tokenizer.digest:
            return []
        name = manifest["splits"]["val"]["shards"][0]["file"]
        code, size = _ID_BYTES[manifest["dtype"]]
        if not isinstance(name, str) or not is_plain_name(name):
            return []
        with (data / name).open("rb") as file:
            ids = array.array(code, file.read((_MOST_WINDOWS * WINDOW + 1) * size))
    except (OSError, ValueError, LookupError, TypeError):
        return []
    if sys.byteorder == "big":
        ids.byteswap()
    known = tokenizer.vocab_size
    return ids.tolist() if all(token_id < known for token_id in ids) else []
