"""What the routes need, gathered in one place: `app.state.services`."""

from __future__ import annotations

from dataclasses import dataclass, field

from model.chat_template import ChatTemplate
from model.tokenizer import Tokenizer
from server.engine.interface import EngineClient
from server.engine.messages import EngineInfo
from server.errors import InvalidRequestError, UnknownModelError, loading_error
from server.grammar_checks import GrammarChecks
from server.history import RequestHistory
from server.lifecycle import Lifecycle
from server.metrics import Metrics
from server.reloads import Reloads
from server.settings import Settings
from server.shadow import Shadows
from server.splits import Split
from server.sse import Heartbeat


@dataclass(frozen=True, slots=True)
class TextTools:
    """How a model's tokens are written."""

    tokenizer: Tokenizer
    chat_template: ChatTemplate | None = None


@dataclass
class Services:
    """`tokenizer` and `chat_template`, the first model's, and `further` ones by name are set once they are loaded,
    before any request is admitted. `models` are the served models' names, `splits` names that several of them answer.
    """

    settings: Settings
    engine: EngineClient
    lifecycle: Lifecycle
    metrics: Metrics
    heartbeat: Heartbeat
    history: RequestHistory | None = None
    reloads: Reloads | None = None
    tokenizer: Tokenizer | None = None
    chat_template: ChatTemplate | None = None
    further: dict[str, TextTools] = field(default_factory=dict)
    models: list[str] = field(default_factory=list)
    splits: dict[str, Split] = field(default_factory=dict)
    shadows: Shadows | None = None
    grammars: GrammarChecks = field(default_factory=GrammarChecks)

    def set_tokenizer(
        self,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate | None = None,
        further: dict[str, TextTools] | None = None,
    ) -> None:
        self.tokenizer, self.chat_template, self.further = tokenizer, chat_template, further or {}
        self.lifecycle.tokenizer_loaded = True

    def model_name(self, name: str | None) -> str:
        """The model that a request names, by default the first. Raises UnknownModelError, and InvalidRequestError for
        the name of a split, which only requests for text may use."""
        if name in self.splits:
            models = ", ".join(self.splits[name].models)
            raise InvalidRequestError(f"model names a split; name one of its models: {models}", param="model")
        if name is not None and name not in self.models:
            raise UnknownModelError
        return self.models[0] if name is None else name

    def text_tools(self, name: str) -> TextTools:
        """Of one of `models`. Raises what a client is told before they are loaded."""
        if self.tokenizer is None:
            raise self.lifecycle.health_error() or loading_error()
        return self.further.get(name) or TextTools(self.tokenizer, self.chat_template)

    @property
    def ready_info(self) -> EngineInfo:
        """The engine's description. Raises what a client is told while there is none."""
        info = self.engine.info
        if info is None:
            raise self.lifecycle.health_error() or loading_error()
        return info
