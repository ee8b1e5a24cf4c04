"""What the routes need, gathered in one place: `app.state.services`."""

from __future__ import annotations

from dataclasses import dataclass, field

from model.chat_template import ChatTemplate
from model.tokenizer import Tokenizer
from server.engine.interface import EngineClient
from server.engine.messages import EngineInfo
from server.errors import loading_error
from server.grammar_checks import GrammarChecks
from server.history import RequestHistory
from server.lifecycle import Lifecycle
from server.metrics import Metrics
from server.settings import Settings
from server.sse import Heartbeat


@dataclass
class Services:
    """`tokenizer` and `chat_template` are set once they are loaded, before any request is admitted."""

    settings: Settings
    engine: EngineClient
    lifecycle: Lifecycle
    metrics: Metrics
    heartbeat: Heartbeat
    history: RequestHistory | None = None
    tokenizer: Tokenizer | None = None
    chat_template: ChatTemplate | None = None
    models: list[str] = field(default_factory=list)
    grammars: GrammarChecks = field(default_factory=GrammarChecks)

    def set_tokenizer(self, tokenizer: Tokenizer, chat_template: ChatTemplate | None = None) -> None:
        self.tokenizer, self.chat_template = tokenizer, chat_template
        self.lifecycle.tokenizer_loaded = True

    @property
    def ready_info(self) -> EngineInfo:
        """The engine's description. Raises what a client is told while there is none."""
        info = self.engine.info
        if info is None:
            raise self.lifecycle.health_error() or loading_error()
        return info
