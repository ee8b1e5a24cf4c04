"""What a run shows on the terminal: a progress bar where there is one, plain lines in a log file."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from model.evaluation import Evaluation
from model.sampling_params import SamplingParams
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from training.generate import sample


class Reporter:
    """A context manager around the loop. `sample_tokens` 0 shows no samples."""

    def __init__(
        self,
        console: Console,
        max_steps: int,
        *,
        first_step: int = 0,
        sample_prompt: str,
        sample_tokens: int,
        seed: int,
    ) -> None:
        self._console = console
        self._sample_prompt, self._sample_tokens, self._seed = sample_prompt, sample_tokens, seed
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._progress.add_task("training", total=max_steps, completed=first_step)

    def __enter__(self) -> Reporter:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def advance(self) -> None:
        self._progress.advance(self._task)

    def line(self, text: str) -> None:
        self._console.print(escape(text), highlight=False, soft_wrap=True)

    def training(self, step: int, loss: float, lr: float, tokens_per_second: float | None, mfu: float | None) -> None:
        share = "" if mfu is None else f"  mfu {mfu:.1%}"
        speed = "" if tokens_per_second is None else f"  {tokens_per_second:,.0f} tokens/s"
        text = f"step {step}  loss {loss:.4f}  lr {lr:.2e}{speed}{share}"
        if self._console.is_terminal:
            self._progress.update(self._task, description=escape(text))
        else:
            self.line(text)

    def evaluation(self, step: int, result: Evaluation, is_best: bool) -> None:
        mark = "  (best so far)" if is_best else ""
        self.line(
            f"step {step}  validation loss {result.loss:.4f}  perplexity {result.perplexity:.2f}  "
            f"bits per byte {result.bits_per_byte:.4f}{mark}"
        )

    def sample(self, model: Transformer, tokenizer: Tokenizer) -> None:
        """Shows what the model writes after the prompt; the same seed every time, so samples can be compared."""
        if not self._sample_tokens:
            return
        params = SamplingParams(max_tokens=self._sample_tokens, temperature=0.8, seed=self._seed)
        was_training = model.training
        model.eval()
        text = sample(model, tokenizer, self._sample_prompt, params).text
        model.train(was_training)
        self.line(f"sample: {self._sample_prompt}{text}")
