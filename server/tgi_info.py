"""What clients of Text Generation Inference read from GET /info, under TGI's names."""

from __future__ import annotations

from server.engine.messages import GENERATION
from server.schemas.sampling import MAX_CHOICES, MAX_STOPS
from server.services import Services


def tgi_info(services: Services, version: str) -> dict[str, object]:
    """Lengths in tokens. A prompt leaves room for one token; `max_total_tokens` is the model's whole context."""
    engine = services.ready_info
    model = engine.models[0]
    capacity = engine.max_num_seqs + services.settings.max_queued_requests
    return {
        "model_id": model.name,
        "model_sha": model.weights_digest,
        "model_pipeline_tag": "text-generation" if model.task == GENERATION else "text-classification",
        "max_concurrent_requests": capacity,
        "max_best_of": min(MAX_CHOICES, capacity),
        "max_stop_sequences": MAX_STOPS,
        "max_input_tokens": engine.max_model_len - 1,
        "max_total_tokens": engine.max_model_len,
        "max_client_batch_size": 1,
        "router": "quill",
        "version": version,
    }
