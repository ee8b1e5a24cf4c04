"""The options of `python -m training generate`, in the groups in which --help shows them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer


def _prompts(help_text: str, *names: str) -> Any:
    return typer.Option(*names, help=help_text, rich_help_panel="Prompts")


def _sampling(help_text: str, *names: str, minimum: int | None = None) -> Any:
    return typer.Option(*names, help=help_text, rich_help_panel="Sampling", min=minimum)


def _beams(help_text: str) -> Any:
    return typer.Option(help=help_text, rich_help_panel="Beam search")


def _output(help_text: str, *names: str) -> Any:
    return typer.Option(*names, help=help_text, rich_help_panel="Output")


Prompt = Annotated[str, _prompts("text to continue; empty starts from the end-of-text token")]
Prompts = Annotated[
    Path | None, _prompts('file of prompts: one a line, or .jsonl with {"prompt": …}; - is the standard input')
]
Control = Annotated[list[str] | None, _prompts("name=value of a control token; may repeat")]
ChatMode = Annotated[bool | None, _prompts("use the checkpoint's chat template; --interactive does if there is one")]
System = Annotated[str | None, _prompts("system message of the chat")]
Interactive = Annotated[bool, _prompts("read prompts from the terminal; /help explains", "--interactive")]

MaxTokens = Annotated[int, _sampling("tokens to generate")]
MinTokens = Annotated[int, _sampling("tokens before anything ends a text")]
Temperature = Annotated[float, _sampling("0 = greedy")]
Greedy = Annotated[bool, _sampling("always the likeliest token", "--greedy")]
TopK = Annotated[int, _sampling("0 = off")]
TopP = Annotated[float, _sampling("1 = off")]
MinP = Annotated[float, _sampling("0 = off")]
RepetitionPenalty = Annotated[float, _sampling("1 = off")]
Penalty = Annotated[float, _sampling("0 = off")]
LogitBias = Annotated[list[str] | None, _sampling("ID=BIAS, added to that token's logit; may repeat")]
Stop = Annotated[list[str] | None, _sampling("string that ends a text; may repeat")]
StopTokenId = Annotated[list[int] | None, _sampling("token id that ends a text; may repeat")]
IgnoreEos = Annotated[bool, _sampling("go on behind the end-of-text token", "--ignore-eos")]
Seed = Annotated[int, _sampling("the same seed gives the same text")]
NumSamples = Annotated[int, _sampling("texts for each prompt, with seeds seed, seed + 1 …", minimum=1)]

Beams = Annotated[int | None, _beams("hypotheses side by side; the --num-samples best are shown")]
LengthPenalty = Annotated[float, _beams("above 0 favours long texts, below 0 short ones")]
EarlyStopping = Annotated[
    Literal["off", "first", "never"],
    _beams("first: at the first N ended texts; never: only when no better one is possible"),
]

Stream = Annotated[bool, _output("show text as it comes", "--stream")]
Echo = Annotated[bool, _output("show each prompt before its text")]
LogprobsOption = Annotated[int | None, _output("best alternatives of each token, for --json and --out")]
Out = Annotated[Path | None, _output("new file of JSON lines, one for each text")]
Verbose = Annotated[bool, _output("tell the speed on the standard error", "--verbose")]
BatchSize = Annotated[int, typer.Option(min=1, help="texts generated at a time")]
