"""Watcher: serves the newest checkpoint of a watched folder as soon as it is shown to be no worse than the live one.

    poll the folder → judge the newest checkpoint (server/reload_gate.py) → load it beside the live weights → swap

A checkpoint that is turned down is remembered by its digest and not tried again; the live weights just go on serving.
Nothing here can stop the server: what fails is logged and shown in /info.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Protocol

from server.engine.interface import EngineClient, EngineRequestError, EngineUnavailableError, QueueFullError
from server.engine.messages import SelfCheckResult, WeightsLoaded
from server.reload_gate import FAILED_TO_LOAD, NO_MEMORY, SWAPPED, Gate, Judgement, Measured, Sample, measure
from server.reloads import Attempt, Reloads
from server.watch import FoundCheckpoint, Signature, WatchedFolder, signature

logger = logging.getLogger("server.reload")

# What may end differently when nothing about the checkpoint changed is tried again after so many seconds.
_RETRY_SECONDS = 30.0
_MAY_PASS = (NO_MEMORY, FAILED_TO_LOAD)


class ReloadableEngine(EngineClient, Protocol):
    """An engine that takes other weights while it runs."""

    async def load_weights(
        self, model: str, folder: str, weights: str, self_check: SelfCheckResult
    ) -> WeightsLoaded: ...


class Watcher:
    """Watches for one model; `run` until it is cancelled."""

    def __init__(
        self, engine: ReloadableEngine, folder: WatchedFolder, gate: Gate, sample: Sample, reloads: Reloads,
        interval: float,
    ) -> None:  # fmt: skip
        self._engine, self._folder, self._gate, self._sample = engine, folder, gate, sample
        self._reloads, self._interval = reloads, interval
        self._rejected: set[str] = set()
        self._damaged: Signature = ()
        self._retry_at = 0.0

    async def run(self) -> None:
        while True:
            try:
                await self.poll()
            except (EngineUnavailableError, EngineRequestError, QueueFullError) as error:
                logger.debug("the watched folder is looked at later: %s", error)
            except Exception:
                logger.exception("looking at the watched folder failed")
            await asyncio.sleep(self._interval)

    async def poll(self) -> Attempt | None:
        """Try the newest checkpoint if it is new."""
        self._note_live()
        found = await asyncio.to_thread(self._new_checkpoint)
        return None if found is None else await self._attempt(found)

    def _note_live(self) -> None:
        """The weights that are served now; what was measured of others says nothing of them."""
        info = self._engine.info
        if info is None:
            raise EngineUnavailableError("the engine is loading", 1)
        weights = next(model.weights_digest for model in info.models if model.name == self._reloads.model)
        if weights != self._reloads.live_weights:
            self._reloads.live_weights, self._reloads.live = weights, None

    def _new_checkpoint(self) -> FoundCheckpoint | None:
        found = self._folder.newest()
        if found is None or found.weights == self._reloads.live_weights or found.weights in self._rejected:
            return None
        if self._damaged and signature(found.folder) == self._damaged:
            return None
        return None if time.monotonic() < self._retry_at else found

    async def _attempt(self, found: FoundCheckpoint) -> Attempt:
        started = time.monotonic()
        seen = await asyncio.to_thread(signature, found.folder)
        logger.info("a new checkpoint, %s: it is being judged", found.name)
        live = self._reloads.live
        if live is None:
            self._reloads.live = live = await measure(self._engine, self._sample, self._reloads.model)
        judgement = await self._gate.judge(found, live)
        if judgement.verdict == SWAPPED:
            judgement = await self._swap(found, judgement)
        else:
            self._remember(found, judgement, seen)
        attempt = _attempt(found, judgement, live, time.monotonic() - started)
        self._reloads.record(attempt)
        _log(found, attempt, judgement)
        return attempt

    async def _swap(self, found: FoundCheckpoint, judgement: Judgement) -> Judgement:
        assert found.weights is not None, "only a checkpoint with a manifest passes the gate"
        loaded = await self._engine.load_weights(
            self._reloads.model, str(found.folder), found.weights, judgement.self_check
        )
        if loaded.error is not None:
            self._retry_at = time.monotonic() + _RETRY_SECONDS
            return Judgement(FAILED_TO_LOAD, loaded.error, judgement.measured, judgement.self_check)
        # The same weights in the same kernels: what the gate measured is what the live ones do.
        self._reloads.live_weights, self._reloads.live = found.weights, judgement.measured
        return judgement

    def _remember(self, found: FoundCheckpoint, judgement: Judgement, seen: Signature) -> None:
        if judgement.verdict in _MAY_PASS:
            self._retry_at = time.monotonic() + _RETRY_SECONDS
        elif judgement.measured is None:
            # Perhaps a copy in progress: other files under the same name are another checkpoint.
            self._damaged = seen
        elif found.weights is not None:
            self._rejected.add(found.weights)


def _attempt(found: FoundCheckpoint, judgement: Judgement, live: Measured, seconds: float) -> Attempt:
    step = None if found.manifest is None else found.manifest.provenance.step
    loss = None if judgement.measured is None else judgement.measured.loss
    reason = judgement.reason
    if reason is not None:
        reason = reason.replace(str(found.folder), found.name)  # paths are not for clients
    return Attempt(found.name, found.weights, step, judgement.verdict, reason, loss, live.loss, seconds)


def _log(found: FoundCheckpoint, attempt: Attempt, judgement: Judgement) -> None:
    if attempt.verdict == SWAPPED:
        logger.info(
            "serving %s now (%s, step %s): loss %.4f, before %.4f, in %.1f s",
            *(found.name, attempt.weights, attempt.step, attempt.loss, attempt.live_loss, attempt.seconds),
        )
    else:
        logger.warning("%s is not served (%s): %s", found.name, attempt.verdict, judgement.reason)
