"""Runs recipes one after the other on every rank: `torchrun … -m tests.training.distributed_worker JOBS.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from rich.console import Console

from training.distributed import init_distributed
from training.recipe import build_config
from training.reporting import run_log
from training.run import run_on_rank


def main() -> None:
    torch.set_num_threads(1)
    run_log.write_page = lambda run_dir: None  # drawing takes longer than the runs
    distributed = init_distributed("cpu")
    with distributed.failing_together():
        for tree in json.loads(Path(sys.argv[1]).read_text()):
            run_on_rank(build_config(tree), "auto", Console(width=200), distributed)


if __name__ == "__main__":
    main()
