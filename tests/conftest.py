"""What every test lives with: one compute thread, none of the developer's own settings, no network but loopback."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest

# Set before anything imports torch, and inherited by child processes: tiny matrices gain nothing from threads, and
# two test runs on one machine do not fight over cores.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
for _name in [name for name in os.environ if name.startswith("QUILL_")]:
    del os.environ[_name]

_LOOPBACK = ("127.", "::1", "localhost", "0.0.0.0")


@pytest.fixture(scope="module")
def quiet_transformers() -> Iterator[None]:
    """Asked for by files whose many loads and warnings of transformers would bury what pytest says."""
    from transformers import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """Connections of the test process that would leave the machine raise."""

    def guarded(connect: Any) -> Any:
        def call(self: socket.socket, address: Any) -> Any:
            if self.family in (socket.AF_INET, socket.AF_INET6) and not address[0].startswith(_LOOPBACK):
                raise RuntimeError(f"a test tried to reach {address[0]}; tests stay on the loopback interface")
            return connect(self, address)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded(socket.socket.connect))
        patch.setattr(socket.socket, "connect_ex", guarded(socket.socket.connect_ex))
        yield
