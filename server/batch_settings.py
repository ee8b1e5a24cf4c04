"""What `python -m server batch` can be told: the engine's settings, and the two files."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from model.sampling_params import MAX_SEED
from server.settings import EngineSettings, Settings

# Nobody is turned away in a batch: what waits, waits in the input.
_NO_LIMIT = 1 << 30
_LARGEST_BODY = 64 << 20


class BatchSettings(EngineSettings):
    """Answer a file of requests, one JSON object a line. The same command goes on where it was stopped or killed."""

    model_config = SettingsConfigDict(cli_prog_name="python -m server batch")

    input: Path = Field(description="request lines as OpenAI's batches have them: custom_id, method, url and body")
    output: Path = Field(description="file for the answers, one line each; those that it holds already are kept")
    seed: int | None = Field(
        None, ge=0, le=MAX_SEED, description="lines without a seed get one that follows from this and their custom_id"
    )

    def for_app(self) -> Settings:
        """The server's settings for the app that answers; QUILL_… variables that concern HTTP have no say."""
        values = {name: getattr(self, name) for name in EngineSettings.model_fields}
        return Settings.model_construct(
            **values, max_queued_requests=_NO_LIMIT, max_body_size=_LARGEST_BODY, health_timeout=float(_NO_LIMIT)
        )
