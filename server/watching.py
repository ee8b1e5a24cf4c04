"""--watch: a Watcher made of the settings and of what is served."""

from __future__ import annotations

from typing import cast

from model.hf_config import load_config
from model.tokenizer import Tokenizer
from server.engine.messages import GENERATION
from server.held_out import WatchError, make_sample
from server.reload_gate import Gate
from server.reloads import ReloadCollector, Reloads
from server.services import Services
from server.watch import WatchedFolder
from server.watcher import ReloadableEngine, Watcher


def make_watcher(services: Services, tokenizer: Tokenizer) -> Watcher | None:
    """Once the engine is ready; None without --watch. `tokenizer` is that of the first model, which is the watched one.

    Raises WatchError where nothing can be compared; /info then says so.
    """
    settings, model = services.settings, services.ready_info.models[0]
    if settings.watch is None:
        return None
    services.reloads = reloads = Reloads(model.name, settings.watch.resolve().name)
    services.metrics.register(ReloadCollector(reloads))
    try:
        if model.task != GENERATION:
            raise WatchError("--watch is for models that generate text; a classifier is replaced by a restart")
        context = model.max_model_len or services.ready_info.max_model_len
        sample = make_sample(settings.watch, settings.watch_text, tokenizer, context)
    except WatchError:
        reloads.error = "there is nothing to compare checkpoints by; the server's log says why"
        raise
    gate = Gate(
        settings.engine_config(),
        load_config(settings.model_path),
        model.num_parameters,
        tokenizer,
        sample,
        settings.watch_tolerance,
    )
    engine = cast(ReloadableEngine, services.engine)
    return Watcher(engine, WatchedFolder(settings.watch), gate, sample, reloads, settings.watch_interval)
