"""`python -m training info`: this machine, and what a recipe would need of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from training.commands.options import JsonFlag, print_result
from training.reporting.quantities import byte_size, duration, flop_rate

if TYPE_CHECKING:
    from training.config import TrainConfig
    from training.estimate import Estimate
    from training.hardware import Device, Hardware


def info(
    recipe: Annotated[str | None, typer.Argument(help="recipe whose needs are told: its name or a TOML file")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value …")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Show devices and their peaks; with a recipe also its parameters, FLOPs, memory and passes over the data."""
    from dataclasses import asdict

    from training.hardware import detect_hardware
    from training.recipe import load_config

    config = None if recipe is None else load_config(recipe, overrides or ())
    needs = None
    if config is not None:
        from training.estimate import estimate

        needs = estimate(config)
    hardware = detect_hardware()
    values: dict[str, Any] = {"hardware": asdict(hardware)}
    lines = _hardware_lines(hardware)
    if config is not None and needs is not None:
        derived = {name: getattr(needs, name) for name in ("num_parameters", "epochs", "state_bytes")}
        values["recipe"] = asdict(needs) | derived | {"device": _training_device(config, hardware).name}
        lines += ["", *_recipe_lines(config, needs, _training_device(config, hardware))]
    print_result(as_json, values, lines)


def _training_device(config: TrainConfig, hardware: Hardware) -> Device:
    from training.build import resolve_device

    device = resolve_device(config.train.device)
    name = "cpu" if device.type == "cpu" else f"cuda:{device.index or 0}"
    return next(found for found in hardware.devices if found.name == name)


def _hardware_lines(hardware: Hardware) -> list[str]:
    lines = [f"{hardware.system}, Python {hardware.python}, torch {hardware.torch}, {hardware.threads} threads"]
    for device in hardware.devices:
        lines.append(f"{device.name}: {device.description}, {byte_size(device.memory_bytes)}")
        if not device.trains:
            lines.append("  not used for training")
            continue
        lines.append(f"  bfloat16: {'yes' if device.bfloat16 else 'no units for it'}")
        lines.append(f"  peak: {_peaks(device)}")
    lines.append(f"torch.compile: {', '.join(hardware.compiles) or 'no compiler found'}")
    return lines


def _peaks(device: Device) -> str:
    if device.peak_bfloat16 is None or device.peak_float32 is None:
        return "not known, so MFU is not reported"
    half, single = flop_rate(device.peak_bfloat16), flop_rate(device.peak_float32)
    wide = "float32 (TF32 where the card has it)" if device.name.startswith("cuda") else "float32"
    return f"16-bit {half}, {wide} {single}, {device.peak_source}"


def _recipe_lines(config: TrainConfig, needs: Estimate, device: Device) -> list[str]:
    parts = ", ".join(f"{name} {count:,}" for name, count in needs.parameters.items() if count)
    lines = [
        f"model: {needs.model.architecture}, {needs.num_parameters:,} parameters ({parts})",
        f"data: {needs.data_tokens:,} tokens in the training split",
        f"run: {config.train.max_steps:,} steps of {needs.tokens_per_step:,} tokens on each rank: "
        f"{needs.train_tokens:,} tokens, {needs.epochs:.3g} passes over the data, "
        f"{needs.train_tokens / needs.num_parameters:.3g} tokens a parameter",
        f"compute: {needs.flops_per_token:.4g} FLOPs a token, {needs.train_flops:.4g} in all"
        + _shortest(config, needs, device),
        f"memory: {byte_size(needs.state_bytes)} = weights {byte_size(needs.weights_bytes)} + gradients "
        f"{byte_size(needs.gradients_bytes)} + optimiser {byte_size(needs.optimizer_bytes)}; activations come on top",
    ]
    if needs.state_bytes > device.memory_bytes:
        lines.append(f"warning: that is more than the {byte_size(device.memory_bytes)} of {device.name}")
    return lines


def _shortest(config: TrainConfig, needs: Estimate, device: Device) -> str:
    peak = device.peak_float32 if config.train.dtype == "float32" else device.peak_bfloat16
    return f"; no less than {duration(needs.train_flops / peak)} at the peak of {device.name}" if peak else ""
