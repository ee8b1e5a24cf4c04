"""Errors of the user's making that the training package raises.

QuillError (model.errors)
├── RecipeError     a recipe, an override or a command-line value that cannot be used
├── DataError       a text, a prepared data folder or a shard that is absent, empty or damaged
├── ResumeError     a run folder that cannot be continued with this recipe
├── DivergedError   the loss is no longer a number
└── LostRankError   a process of the run that the others need has gone

Each message is one sentence that names the field or file and says what to do.
"""

from __future__ import annotations

from model.errors import QuillError


class RecipeError(QuillError):
    pass


class DataError(QuillError):
    pass


class ResumeError(QuillError):
    pass


class DivergedError(QuillError):
    pass


class LostRankError(QuillError):
    pass
