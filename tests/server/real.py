"""`python -m server` as a child process over a real engine, on tiny checkpoints that are made here."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import psutil
import torch

from model.checkpoint import load_model, save_model
from model.config import ModelConfig, gpt2_config, llama_config
from model.generate import CausalModel
from model.packed_model import pack_model
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from tests.server.live import wait_until

# A child imports torch before it answers, on machines that may be busy.
PATIENCE = 60.0
EOS = 256
# Wider than the tokenizer's 257 ids, as padded checkpoints are.
VOCAB_SIZE = 272


def random_config() -> ModelConfig:
    config = llama_config(2, 4, 2, 64, 160, vocab_size=VOCAB_SIZE, max_seq_len=512, tie_word_embeddings=False)
    return replace(config, bos_token_id=EOS, eos_token_id=EOS)


def save_random(folder: Path) -> Path:
    """A small Llama with random weights. Its wide output rows give clear preferences, most of them for printable
    characters."""
    model = Transformer(random_config())
    model.init_weights(seed=11)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_({"lm_head.weight": 8.0, "embed_tokens.weight": 20.0}.get(name, 1.0))
            if name == "lm_head.weight":
                weight[32:127].mul_(3.0)
    save_model(folder, model, tokenizer=Tokenizer.bytes(), dtype=torch.float32)
    return folder


def load_alone(folder: Path) -> CausalModel:
    """The checkpoint as `generate()` takes it, with the kernels that the engine uses on the CPU."""
    return pack_model(load_model(folder, dtype=torch.float32))


def save_parrot(folder: Path, text: str, *, context: int) -> Path:
    """A GPT-2 whose greedy output repeats `text`, byte by byte, over and over: at position p, counted from the
    prompt's first token, it says byte p of the repeated text. `text` is at most 255 bytes of UTF-8.

    Its attention and MLP add nothing, so that only the position decides: position p has a dimension of its own,
    which the output row of its byte reads.
    """
    data = text.encode()
    config = gpt2_config(1, 4, 256, vocab_size=VOCAB_SIZE, max_seq_len=context)
    config = replace(config, tie_word_embeddings=False, bos_token_id=EOS, eos_token_id=EOS)
    state = {name: torch.zeros_like(value) for name, value in Transformer(config).state_dict().items()}
    for position in range(context):
        state["embed_positions.weight"][position, position % len(data)] = 1.0
    for position, byte in enumerate(data):
        state["lm_head.weight"][byte, position] = 1.0
    state["final_norm.weight"].fill_(1.0)
    model = Transformer(config)
    model.load_state_dict(state)
    save_model(folder, model, tokenizer=Tokenizer.bytes(), dtype=torch.float32)
    return folder


class RealServer:
    """The server's process and its engine's; `wait_ready` before requests. What it logs is kept in `log`."""

    def __init__(self, folder: Path, *options: str) -> None:
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 — `kill` closes it
        command = [sys.executable, "-m", "server", "--model", str(folder), "--port", "0", *options]
        self.popen = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._stderr, text=True)
        self.process = psutil.Process(self.popen.pid)
        self.url = ""

    def wait_listening(self) -> None:
        """Until the port is open, which it is before the engine has loaded."""

        def listening() -> bool:
            ports = [c.laddr.port for c in self.process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
            self.url = f"http://127.0.0.1:{ports[0]}" if ports else ""
            return bool(ports)

        wait_until(listening, seconds=PATIENCE)

    def wait_ready(self) -> str:
        """The two lines of greeting, which are printed when requests are taken."""
        assert self.popen.stdout is not None
        greeting = self.popen.stdout.readline() + self.popen.stdout.readline()
        match = re.search(r"http://[\d.]+:\d+", greeting)
        assert match is not None, self.log
        self.url = match[0]
        return greeting

    @property
    def engine(self) -> psutil.Process:
        """The engine's process, once it has been started."""
        wait_until(self.process.children, seconds=PATIENCE)
        return self.process.children()[0]

    @property
    def log(self) -> str:
        self._stderr.seek(0)
        return self._stderr.read().decode()

    def metric(self, name: str, **labels: str) -> float:
        return sum_metric(httpx.get(f"{self.url}/metrics", timeout=PATIENCE).text, name, **labels)

    def wait_used(self, name: str = "vllm:kv_cache_usage_perc", least: float = 1e-9) -> None:
        """Until a gauge is that high."""
        wait_until(lambda: self.metric(name) >= least, seconds=PATIENCE)

    def wait_idle(self, seconds: float = 5.0) -> float:
        """Until no sequence and no block is in use; returns the seconds that took."""
        names = ("vllm:kv_cache_usage_perc", "vllm:num_requests_running", "vllm:num_requests_waiting")

        def idle() -> bool:
            text = httpx.get(f"{self.url}/metrics", timeout=PATIENCE).text
            return all(sum_metric(text, name) == 0.0 for name in names)

        return wait_until(idle, seconds=seconds)

    def terminate(self) -> None:
        self.popen.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        return self.popen.wait(timeout=PATIENCE)

    def kill(self) -> None:
        """End whatever is left of both processes."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in self.process.children():
                child.kill()
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.communicate()
        self._stderr.close()


@contextlib.contextmanager
def running(folder: Path, *options: str) -> Iterator[RealServer]:
    server = RealServer(folder, "--device", "cpu", "--dtype", "float32", *options)
    try:
        yield server
    finally:
        server.kill()


def sum_metric(text: str, name: str, **labels: str) -> float:
    """The sum of a metric's samples whose labels include the given ones."""
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    pattern = re.compile(rf"^{re.escape(name)}(?:{{(.*)}})? (\S+)$", re.MULTILINE)
    samples = [float(value) for have, value in pattern.findall(text) if all(label in have for label in wanted)]
    assert samples, f"/metrics has no {name}"
    return sum(samples)


def memory_maps(pid: int) -> str:
    """The files that a process has mapped, one a line."""
    return Path(f"/proc/{pid}/maps").read_text()
