"""Errors of the user's making that the model package raises.

QuillError
├── ConfigError                   config.json or a ModelConfig that cannot be run
├── CheckpointError               weights: missing, extra, misshapen, damaged or in a refused format
├── HubError                      a model's name that is none, or that cannot be fetched
├── TokenizerError                tokenizer files that are absent or cannot be used
├── ControlError                  a control or value that the model was not trained with, or that cannot be declared
└── InvalidSamplingParamsError    a sampling parameter out of its bounds (`.param` names it)

Each message is one sentence that names the field or file and says what to do.
"""

from __future__ import annotations


class QuillError(Exception):
    """Base of every error that a user can cause and mend."""


class ConfigError(QuillError):
    pass


class CheckpointError(QuillError):
    pass


class HubError(QuillError):
    pass


class TokenizerError(QuillError):
    pass


class ControlError(QuillError):
    pass


class InvalidSamplingParamsError(QuillError):
    def __init__(self, param: str, rule: str) -> None:
        super().__init__(f"{param} {rule}")
        self.param = param
