"""`python -m training selftest`: does a model compute what it should?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from training.commands.options import DeviceOption, JsonFlag, model_folder, print_result
from training.launch import share_cores


def selftest_command(
    checkpoint: Annotated[
        Path | None, typer.Argument(help="checkpoint folder or name on the Hub; without it, a fresh preset")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="shape of the fresh model; tiny if none is named")] = None,
    device: DeviceOption = "auto",
    as_json: JsonFlag = False,
) -> None:
    """Check forward pass, causality, KV cache, gradients, generating and saving; exit status 1 if one fails."""
    share_cores()
    from dataclasses import asdict

    from training.errors import RecipeError
    from training.selftest import load_subject, run_checks

    if checkpoint is not None and preset is not None:
        raise RecipeError(f"--preset has no meaning for {checkpoint}; leave out one of them")
    subject = load_subject(None if checkpoint is None else model_folder(checkpoint), preset or "tiny", device)
    checks = run_checks(subject)
    passed = all(check.passed for check in checks)
    width = max(len(check.name) for check in checks)
    lines = [f"{check.name:<{width}}  {'ok' if check.passed else 'FAILED':<6}  {check.detail}" for check in checks]
    values = {
        "model": str(checkpoint or preset or "tiny"), "passed": passed,
        "checks": [asdict(check) for check in checks],
    }  # fmt: skip
    failed = sum(not check.passed for check in checks)
    print_result(as_json, values, [*lines, "all passed" if passed else f"{failed} of {len(checks)} failed"])
    if not passed:
        raise typer.Exit(1)
