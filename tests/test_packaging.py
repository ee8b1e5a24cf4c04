"""What gets installed: pins that satisfy the ranges, package data that is packed, an image that runs unprivileged."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    exact = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in exact}


def requirements() -> list[Requirement]:
    extras = chain.from_iterable(PROJECT["project"]["optional-dependencies"].values())
    lines = [*PROJECT["project"]["dependencies"], *PROJECT["build-system"]["requires"], *extras]
    return [requirement for line in lines if (requirement := Requirement(line)).name != PROJECT["project"]["name"]]


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_a_dependency_is_pinned_inside_its_range(requirement: Requirement) -> None:
    assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)])


# Imported under another name than the package's; triton comes with torch's CUDA build.
PACKAGE_OF = {"yaml": "pyyaml", "triton": "torch", "opentelemetry": "opentelemetry-sdk"}


@pytest.mark.parametrize(
    ("folders", "development"), [(("model", "server", "training"), False), (("tests",), True)],
    ids=["packages", "tests"],
)  # fmt: skip
def test_what_is_imported_is_declared(folders: tuple[str, ...], development: bool) -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    lines = [
        *PROJECT["project"]["dependencies"],
        *(line for name, group in extras.items() for line in group if development or name != "dev"),
    ]
    declared = {canonicalize_name(Requirement(line).name) for line in lines}
    own = {"model", "server", "training", "tests", "benchmarks", *sys.stdlib_module_names}
    imported = {name for folder in folders for path in (ROOT / folder).rglob("*.py") for name in roots(path)}
    assert {PACKAGE_OF.get(name, canonicalize_name(name)) for name in imported - own} <= declared


def roots(path: Path) -> set[str]:
    """The first part of every name that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def test_pins_hold_on_any_host() -> None:
    for name, version in pins().items():
        assert re.fullmatch(r"[0-9][0-9a-z.]*", version), f"{name} carries a local label or an address"


def test_data_files_are_packed() -> None:
    """Every file in a package that is not Python is matched by that package's `package-data`."""
    forgotten = []
    for package, patterns in PROJECT["tool"]["setuptools"]["package-data"].items():
        folder = ROOT / package
        packed = {path for pattern in patterns for path in folder.glob(pattern)}
        for path in folder.rglob("*"):
            if path.is_file() and path.suffix not in (".py", ".pyc", ".so") and path not in packed:
                forgotten.append(str(path.relative_to(ROOT)))
    assert forgotten == []


def test_every_package_folder_is_a_package() -> None:
    folders = {path.parent for package in ("model", "server", "training") for path in (ROOT / package).rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []


def instructions(name: str) -> list[str]:
    return re.findall(rf"^{name} (.+)$", DOCKERFILE, re.MULTILINE)


def test_the_image_runs_unprivileged_and_gets_the_signals() -> None:
    assert instructions("USER")[-1] == "10001:10001"
    assert json.loads(instructions("ENTRYPOINT")[-1]) == ["python3", "-m", "server"]
    assert instructions("STOPSIGNAL") == ["SIGTERM"]
    assert "/ready" in DOCKERFILE[DOCKERFILE.index("HEALTHCHECK") :]


def test_the_image_builds_without_buildkit() -> None:
    assert not re.search(r"<<-?['\"]?[A-Z]", DOCKERFILE)
    assert "--mount" not in DOCKERFILE
    assert "# syntax" not in DOCKERFILE


def test_the_image_gets_every_source_and_nothing_else() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert lines[1] == "*"
    kept = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert kept == {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "model", "server", "training"}
    assert all((ROOT / name).exists() for name in kept)


def test_targets_named_in_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"serve", "test"} <= named <= targets


def test_ci_runs_the_readmes_test_command() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert {"make lint || status=$?", "make test || status=$?", "exit $status"} <= set(script.splitlines())
    subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")], check=True)
