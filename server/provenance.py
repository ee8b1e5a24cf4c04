"""What an answer says of the weights that gave it, so that a text can be traced to the training behind it."""

from __future__ import annotations

from server.engine.messages import EngineInfo, ModelInfo

_TRAINING = ("step", "run", "data", "validation_loss")


def provenance(model: ModelInfo) -> dict[str, object]:
    """The weights' digest, and of the training its step, run, data digest and validation loss in nats per token; null
    where the checkpoint does not tell."""
    return {"weights": model.weights_digest, **{name: model.provenance.get(name) for name in _TRAINING}}


def context_of(info: EngineInfo, name: str | None) -> int:
    """Tokens that a request to the served model of that name, or to the first, may have."""
    return model_named(info, name).max_model_len or info.max_model_len


def engine_name(info: EngineInfo, name: str | None) -> str | None:
    """What the engine calls the served model of that name: nothing where it is the first."""
    model = model_named(info, name)
    return None if model is info.models[0] else model.name


def model_named(info: EngineInfo, name: str | None) -> ModelInfo:
    """The served model of that name, or the first."""
    return next((model for model in info.models if model.name == name), info.models[0])
