"""CUDA graphs without the capture, which needs a device: replaying runs the padded step. Everything else is real."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from server.engine.cuda_graph import CUDAGraphRunner


class UncapturedGraphs(CUDAGraphRunner):
    """Counts the sizes that were replayed."""

    def _can_draw(self) -> bool:
        return True

    def _capture_all(self) -> dict[int, Callable[[], None]]:
        self.replayed: list[int] = []
        return {size: partial(self._replay, size) for size in self._sizes}

    def _replay(self, size: int) -> None:
        self.replayed.append(size)
        self._run(size)
