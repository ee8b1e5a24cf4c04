"""New weights beside the live ones: loaded in a thread of lower priority, put in place between two steps.

The thread reads, verifies and packs; almost all of that runs outside the interpreter's lock, on time that the steps
leave over. Whether the weights are any good has been judged before, in a process of their own.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time

import msgspec
import torch

from model.errors import CheckpointError, QuillError
from server.engine.llm_engine import LLMEngine
from server.engine.messages import LoadWeights, ModelInfo, ReleaseWeights, WeightsLoaded
from server.engine.model_runner import ModelRunner

logger = logging.getLogger(__name__)

# A thread may be taken off its core while it holds the interpreter's lock, and steps then wait for its next turn: at
# the lowest priority, on cores that are all taken, that was half a second.
_NICENESS = 5
# Seconds after which a thread that waits for the interpreter gets it: a step is not to wait 5 ms for the loader.
_SWITCH_INTERVAL = 2e-4
_GPU_SPARE_BYTES = 1 << 30


class WeightsLoader:
    """One load at a time; `finish` is called between two steps."""

    def __init__(self, engine: LLMEngine) -> None:
        self._engine = engine
        self._request: LoadWeights | None = None
        self._thread: threading.Thread | None = None
        self._loaded: tuple[ModelRunner, ModelInfo] | None = None
        self._error: str | None = None
        self._started = 0.0
        self._switch_interval = sys.getswitchinterval()

    @property
    def is_loading(self) -> bool:
        return self._request is not None

    def start(self, request: LoadWeights) -> WeightsLoaded | None:
        """Begin to load; the answer where that cannot be."""
        if self._request is not None:
            return WeightsLoaded(request.model, request.weights, "another checkpoint is being loaded", 0.0)
        self._request, self._started, self._error = request, time.monotonic(), None
        sys.setswitchinterval(_SWITCH_INTERVAL)
        self._thread = threading.Thread(target=self._load, args=(request,), name="weights-loader", daemon=True)
        self._thread.start()
        return None

    def finish(self) -> WeightsLoaded | None:
        """Once the weights are there, or cannot be: serve them, and say how it went."""
        request, thread = self._request, self._thread
        if request is None or thread is None or thread.is_alive():
            return None
        thread.join()
        sys.setswitchinterval(self._switch_interval)
        loaded, self._loaded, self._request, self._thread = self._loaded, None, None, None
        if loaded is not None:
            runner, info = loaded
            self._engine.replace_runner(request.model, runner, info)
        return WeightsLoaded(request.model, request.weights, self._error, time.monotonic() - self._started)

    def release(self, request: ReleaseWeights) -> None:
        self._engine.release_weights(request.model, request.weights)

    def _load(self, request: LoadWeights) -> None:
        """In the thread."""
        with contextlib.suppress(OSError):  # a priority that may not be lowered stays
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        try:
            self._loaded = self._load_beside(request)
        except QuillError as error:
            self._error = str(error)
        except (MemoryError, torch.OutOfMemoryError):
            self._error = "no memory for the new weights beside the live ones"
        except Exception as error:
            logger.exception("loading new weights failed")
            self._error = f"{type(error).__name__} while loading"

    def _load_beside(self, request: LoadWeights) -> tuple[ModelRunner, ModelInfo]:
        """Raises QuillError, among others for a folder that is another than the one that was judged."""
        _require_gpu_memory(self._engine)
        runner = self._engine.runners.load_beside(request.model, request.folder)
        info = self._engine.describe_model(request.model, runner)
        if info.weights_digest != request.weights:
            raise CheckpointError(f"{request.folder} was replaced while it was being loaded; it is looked at again")
        return runner, msgspec.structs.replace(info, self_check=request.self_check)


def _require_gpu_memory(engine: LLMEngine) -> None:
    """Raises CheckpointError where a GPU has no room for a second set of weights."""
    runner = engine.runner
    if runner.device.type != "cuda":
        return
    needed = runner.num_parameters * runner.dtype.itemsize + _GPU_SPARE_BYTES
    free, _ = torch.cuda.mem_get_info(runner.device)
    if needed > free:
        raise CheckpointError(f"new weights take up to {needed >> 20}MiB of GPU memory, and {free >> 20}MiB are free")
