"""Control tokens of a checkpoint, for the command line.

    python -m training generate runs/verse/checkpoints/best --control theme=rain --control meter=doha

What they are, and their file, stands in model/controls.py.
"""

from __future__ import annotations

from pathlib import Path

from model.controls import read_controls
from model.tokenizer import Tokenizer


def control_prefix(checkpoint: Path, choices: list[str]) -> list[int]:
    """The ids that stand before a document of these `name=value` choices; the prompt follows, add_special=False.

    In declared order, whatever the order of the choices; [] without choices. Raises ControlError, which lists what
    is known, for a control or value that the model was not trained with, and TokenizerError for damaged files.
    """
    return read_controls(checkpoint).prefix_ids(Tokenizer.load(checkpoint), choices) if choices else []
