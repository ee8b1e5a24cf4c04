"""Drive a text-generation URL with concurrent streaming clients and report latencies and throughput.

    python -m benchmarks.serving --url http://127.0.0.1:8000/generate --clients 8 --requests 64

The API follows from the path: `/v1/completions` gets OpenAI's body (vLLM, llama-server, ours), any other path our
own. Prompts are lists of random token ids, decoding is greedy and ignores EOS, so every stream has the same
length. A stream that fails, breaks off or brings another number of tokens ends the run with exit code 1.
The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from benchmarks.http_client import LoadGenerator, Run, Target, TargetError
from benchmarks.recording import StreamError, StreamResult, read_stream
from benchmarks.summary import Summary
from benchmarks.workload import Workload, random_prompts

WARM_UP_TOKENS = 8


def request_body(
    path: str, prompt: list[int] | str, max_tokens: int, model: str | None, extra: dict[str, Any]
) -> bytes:
    """The JSON body of one streamed greedy request; `extra` overrides any field."""
    body: dict[str, Any] = {
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    if path.endswith("/completions"):
        body["stream_options"] = {"include_usage": True}
    if model is not None:
        body["model"] = model
    return json.dumps(body | extra, separators=(",", ":")).encode()


def latencies(result: StreamResult) -> tuple[float, float, list[float], float | None]:
    """(TTFT, E2E, ITLs, TPOT) of one stream in seconds; TPOT is None for a single token."""
    times = result.token_times
    gaps = [later - earlier for earlier, later in pairwise(times)]
    tpot = (times[-1] - times[0]) / (result.num_tokens - 1) if result.num_tokens > 1 else None
    return times[0] - result.sent_at, result.finished_at - result.sent_at, gaps, tpot


def report(run: Run, results: Sequence[StreamResult]) -> dict[str, Any]:
    """The figures of one run: latencies in milliseconds, rates per second."""
    ttft, e2e, itl, tpot = [], [], [], []
    for result in results:
        first, whole, gaps, per_token = latencies(result)
        ttft.append(first)
        e2e.append(whole)
        itl.extend(gaps)
        if per_token is not None:
            tpot.append(per_token)
    output_tokens = sum(result.num_tokens for result in results)
    milliseconds = {
        name: summary.as_dict() if (summary := Summary.of([1e3 * value for value in values])) else None
        for name, values in (("ttft_ms", ttft), ("itl_ms", itl), ("tpot_ms", tpot), ("e2e_ms", e2e))
    }
    return {
        "requests": len(results),
        "seconds": run.seconds,
        "client_cpu_seconds": run.cpu_seconds,
        "prompt_tokens": sum(result.prompt_tokens for result in results),
        "cached_tokens": sum(result.cached_tokens for result in results),
        "output_tokens": output_tokens,
        "output_tokens_per_second": output_tokens / run.seconds,
        "requests_per_second": len(results) / run.seconds,
        **milliseconds,
    }


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Warm up, run, check every stream. Raises TargetError or StreamError."""
    target = Target.from_url(args.url)
    workload = Workload(args.prompt_len, args.output_len, args.vocab_size)

    def requests(count: int, output_len: int, seed: int) -> list[bytes]:
        prompts: Sequence[list[int] | str] = random_prompts(workload, count, seed)
        if args.text is not None:
            prompts = [f"{seed}.{index} {args.text}" for index in range(count)]
        return [
            target.request(request_body(target.path, prompt, output_len, args.model, args.extra_body), args.api_key)
            for prompt in prompts
        ]

    generator = LoadGenerator(target, args.timeout)
    try:
        await generator.connect(args.clients)
        warm_up_len = min(WARM_UP_TOKENS, args.output_len)
        warm_up = requests(args.clients * args.warmup, warm_up_len, args.seed + 1_000_003)
        check(await generator.waves(warm_up, args.clients), warm_up_len)
        timed = requests(args.requests, args.output_len, args.seed)
        gc.collect()
        gc.disable()
        run = await run_mode(generator, timed, args)
    finally:
        gc.enable()
        await generator.close()
    return report(run, check(run, args.output_len))


async def run_mode(generator: LoadGenerator, requests: list[bytes], args: argparse.Namespace) -> Run:
    if args.mode == "waves":
        return await generator.waves(requests, args.clients)
    if args.mode == "poisson":
        return await generator.poisson(requests, args.rate, args.seed)
    return await generator.closed_loop(requests, args.clients)


def check(run: Run, output_len: int) -> list[StreamResult]:
    return [read_stream(recording, output_len) for recording in run.recordings]


def print_table(figures: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{figures['url']}, {figures['mode']}, {figures['clients']} clients", title_justify="left")
    for column in ("ms", "mean", "p50", "p99"):
        table.add_column(column, justify="left" if column == "ms" else "right")
    for name in ("ttft_ms", "itl_ms", "tpot_ms", "e2e_ms"):
        row = figures[name]
        cells = [f"{row[key]:.2f}" for key in ("mean", "p50", "p99")] if row else ["–"] * 3
        table.add_row(name.removesuffix("_ms").upper(), *cells)
    console = Console(soft_wrap=True)
    console.print(table)
    console.print(
        f"{figures['output_tokens_per_second']:.1f} output tokens/s, {figures['requests_per_second']:.2f} requests/s, "
        f"{figures['requests']} requests in {figures['seconds']:.2f} s "
        f"(client: {figures['client_cpu_seconds']:.2f} s of CPU)",
        highlight=False,
    )
    if figures["cached_tokens"]:
        cached = figures["cached_tokens"]
        console.print(f"{cached} prompt tokens came from the server's prefix cache: use a --seed not used before")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000/generate")
    parser.add_argument("--clients", type=int, default=8, help="connections (poisson: opened in advance)")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt-len", type=int, default=64, help="tokens per prompt")
    parser.add_argument("--output-len", type=int, default=64, help="tokens per answer")
    parser.add_argument("--mode", choices=("closed", "waves", "poisson"), default="closed")
    parser.add_argument("--rate", type=float, help="poisson: requests a second")
    parser.add_argument("--vocab-size", type=int, default=50_257, help="prompt ids are drawn below this")
    parser.add_argument("--text", help="send this text, numbered, in place of token ids")
    parser.add_argument("--model", help="the request's model field")
    parser.add_argument("--extra-body", type=json.loads, default={}, metavar="JSON", help="fields to add or override")
    parser.add_argument("--api-key")
    parser.add_argument("--warmup", type=int, default=1, help="short untimed requests per client before the run")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts; another seed avoids prefix-cache hits")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds that one response may take")
    parser.add_argument("--json-only", action="store_true", help="no table")
    args = parser.parse_args(argv)
    for name in ("clients", "requests", "prompt_len", "output_len"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.mode == "poisson" and not (args.rate and args.rate > 0):
        parser.error("--mode poisson needs a positive --rate")
    if args.mode == "waves" and args.requests % args.clients:
        parser.error("--mode waves needs --requests to be a multiple of --clients")
    return args


def run_event_loop(args: argparse.Namespace) -> dict[str, Any]:
    try:
        import uvloop
    except ImportError:
        return asyncio.run(measure(args))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(measure(args))


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        figures = run_event_loop(args)
    except (TargetError, StreamError) as error:
        print(f"serving benchmark failed: {error}", file=sys.stderr)
        return 1
    except ExceptionGroup as group:  # poisson mode: the first of the failed streams says enough
        print(f"serving benchmark failed: {group.exceptions[0]}", file=sys.stderr)
        return 1
    settings = ("url", "mode", "clients", "rate", "prompt_len", "output_len", "seed")
    figures = {name: getattr(args, name) for name in settings} | figures
    if not args.json_only:
        print_table(figures)
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
