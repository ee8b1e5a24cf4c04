"""One part of the GPU benchmark, in the process that `benchmarks.gpu_process` starts for it.

python -m benchmarks.gpu_part NAME FIGURES_FILE JOB_AS_JSON
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import msgspec

from benchmarks import (
    gpu_attention,
    gpu_correct,
    gpu_device,
    gpu_engine,
    gpu_host,
    gpu_http,
    gpu_sampling,
    gpu_transformers,
)
from benchmarks.gpu_job import Figures, Job

PARTS: dict[str, Callable[[Job, Figures], None]] = {
    "device": gpu_device.measure,
    "correct": gpu_correct.measure,
    "engine": gpu_engine.measure,
    "http": gpu_http.measure,
    "large": gpu_engine.measure_large,
    "transformers": gpu_transformers.measure,
    "no overlap": partial(gpu_engine.measure_variant, settings={"overlap": False}),
    "no graphs": partial(gpu_engine.measure_variant, settings={"cuda_graphs": False}),
    "deterministic": partial(gpu_engine.measure_variant, settings={"deterministic": True}),
    "sampling": gpu_sampling.measure,
    "host": gpu_host.measure,
    "attention": gpu_attention.measure,
    "varlen": gpu_engine.measure_varlen,
    "backends": gpu_correct.measure_backends,
}


def main(argv: Sequence[str]) -> int:
    name, figures_file, job_json = argv
    job = msgspec.json.decode(job_json, type=Job)
    with Path(figures_file).open("a") as out:
        PARTS[name](job, Figures(out, job.limit))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
