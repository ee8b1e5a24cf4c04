"""The engine's own process, the only one that touches the device: `python -m server.engine.process FD LEVEL FORMAT`.

It reads its EngineConfig from the socket FD, answers with EngineInfo (or EngineFault), then takes requests and sends
one message per step. It ends when the other side does. LEVEL and FORMAT are those of `server.logs`.
"""

from __future__ import annotations

import gc
import logging
import signal
import socket
import sys
import time
from pathlib import Path

import msgspec

from model.classifier_config import is_classifier
from model.errors import QuillError
from server.engine.channel import SocketChannel
from server.engine.classification_engine import ClassificationEngine
from server.engine.config import EngineConfig
from server.engine.llm_engine import LLMEngine
from server.engine.messages import (
    AbortRequests,
    AddRequest,
    EngineFault,
    EngineInput,
    LoadWeights,
    ReleaseWeights,
    SequenceOutput,
    Shutdown,
    StepOutput,
    WeightsLoaded,
)
from server.engine.reload import WeightsLoader
from server.logs import setup_logging

logger = logging.getLogger("server.engine")
Engine = LLMEngine | ClassificationEngine

# An idle engine still says that it lives this often, in seconds.
_HEARTBEAT = 0.5
# So long it has been idle, in seconds, before it checks itself: a request that comes during a step of the check waits
# for that, and requests often follow each other closely.
_CHECK_AFTER = 0.25
# And looks this often whether new weights have been loaded.
_LOADING_POLL = 0.02
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(EngineInput)


def main(fd: int) -> int:
    """Serve until the other side closes or asks to stop; 1 after a fault."""
    # Signals are the parent's business: it drains, then closes the socket.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    channel = SocketChannel(socket.socket(fileno=fd))
    try:
        config = msgspec.msgpack.decode(_first_message(channel), type=EngineConfig)
        return _run(channel, config)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return 0


def _run(channel: SocketChannel, config: EngineConfig) -> int:
    try:
        engine = _make_engine(config)
    except QuillError as error:
        channel.send(_encoder.encode(EngineFault(str(error), user_error=True)))
        return 1
    except Exception as error:
        logger.exception("the engine failed to start")
        channel.send(_encoder.encode(EngineFault(f"{type(error).__name__} while starting", user_error=False)))
        return 1
    # What is alive now stays alive: collections need not walk it, and pauses stay short.
    gc.collect()
    gc.freeze()
    channel.send(_encoder.encode(engine.info))
    try:
        _serve(channel, engine)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        raise
    except Exception as error:
        logger.exception("the engine failed in a step")
        channel.send(_encoder.encode(EngineFault(f"{type(error).__name__} in a step", user_error=False)))
        return 1
    return 0


def _make_engine(config: EngineConfig) -> Engine:
    """By what the folder's config.json says that the model is for. Raises QuillError."""
    return ClassificationEngine(config) if is_classifier(Path(config.model_path)) else LLMEngine(config)


def _serve(channel: SocketChannel, engine: Engine) -> None:
    """Take what has arrived, run a step, send its output; again. The first idle moments go to the engine's check."""
    last_sent = last_busy = time.monotonic()
    unchecked = engine if isinstance(engine, LLMEngine) else None
    loader = WeightsLoader(engine) if isinstance(engine, LLMEngine) else None
    while True:
        refused: list[SequenceOutput] = []
        patience = _HEARTBEAT if loader is None or not loader.is_loading else _LOADING_POLL
        if engine.has_unfinished:
            patience, last_busy = 0.0, time.monotonic()
        elif unchecked is not None:
            patience = min(patience, max(0.0, last_busy + _CHECK_AFTER - time.monotonic()))
        messages = channel.receive(patience)
        for message in messages:
            request = _decoder.decode(message)
            if isinstance(request, Shutdown):
                return
            if isinstance(request, (LoadWeights, ReleaseWeights)):
                _send_loaded(channel, engine, _begin(loader, request))
            else:
                refused += _take(engine, request)
        if loader is not None:
            _send_loaded(channel, engine, loader.finish())
        if unchecked is not None and time.monotonic() >= last_busy + _CHECK_AFTER and _check(channel, unchecked):
            unchecked = None
        if engine.has_unfinished:
            output = engine.step()
            if refused:
                output = msgspec.structs.replace(output, outputs=refused + output.outputs)
        elif messages or time.monotonic() - last_sent >= _HEARTBEAT:
            output = StepOutput(refused, engine.stats())
        else:
            continue
        channel.send(_encoder.encode(output))
        last_sent = time.monotonic()


def _begin(loader: WeightsLoader | None, request: LoadWeights | ReleaseWeights) -> WeightsLoaded | None:
    """Start to load, or let go of what was replaced; the answer where that is at once."""
    if loader is None:
        error = "a classifier's weights are replaced by a restart"
        return WeightsLoaded(request.model, request.weights, error, 0.0)
    if isinstance(request, LoadWeights):
        return loader.start(request)
    loader.release(request)
    return None


def _send_loaded(channel: SocketChannel, engine: Engine, loaded: WeightsLoaded | None) -> None:
    if loaded is None:
        return
    if loaded.error is None:
        channel.send(_encoder.encode(engine.info))
    channel.send(_encoder.encode(loaded))


def _check(channel: SocketChannel, engine: LLMEngine) -> bool:
    """Go on with the check, or drop it while there are requests. True when it is over and its answer sent."""
    if engine.has_unfinished:
        engine.invariance.reset()
        return False
    if not engine.advance_check():
        return False
    logger.info("tokens do not depend on what else runs here: %s", engine.info.deterministic)
    channel.send(_encoder.encode(engine.info))
    return True


def _take(engine: Engine, request: AddRequest | AbortRequests) -> list[SequenceOutput]:
    """Hand a request to the engine; one that it cannot run ends at once, by itself."""
    if isinstance(request, AbortRequests):
        for request_id in request.request_ids:
            engine.abort(request_id)
        return []
    try:
        engine.add(request)
    except QuillError as error:
        logger.warning("request %d refused: %s", request.request_id, error)
        return [SequenceOutput(request.request_id, [], finish_reason="error")]
    return []


def _first_message(channel: SocketChannel) -> bytes:
    while True:
        messages = channel.receive(_HEARTBEAT)
        if messages:
            return messages[0]


if __name__ == "__main__":
    setup_logging(*sys.argv[2:])
    sys.exit(main(int(sys.argv[1])))
