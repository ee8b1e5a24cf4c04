"""What may stand in the repository: no host of a registry, no path of somebody's machine, no dead link."""

from __future__ import annotations

import re
import socket
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def tracked_files() -> list[Path]:
    """What git tracks or would add."""
    command = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


# Each ~ only breaks the name, so that this file passes its own check.
HOSTS = re.compile(
    "|".join(
        host.replace("~", "")
        for host in (
            *(r"\bpy~pi\.org", "python~hosted", r"\bregis~try\.[a-z0-9-]+\.[a-z]", r"download\.py~torch\.org"),
            *(r"deb\.deb~ian\.org", r"\bgh~cr\.io", r"\bqu~ay\.io", r"\bnv~cr\.io", r"\bdoc~ker\.io"),
            *(r"conda\.ana~conda\.org", r"static\.cra~tes\.io", r"proxy\.go~lang\.org"),
        )
    ),
    re.IGNORECASE,
)
PATHS = re.compile(r"(?<![\w.~$})-])/(?:work|farm|root|Users|home/[a-z]+)(?![\w-])")


def test_no_registry_host_and_no_path_of_a_machine_is_written_down() -> None:
    found = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), start=1):
            if HOSTS.search(line) or PATHS.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}")
    assert found == []


@pytest.mark.parametrize("text", ["/wo" + "rk/main/x", "see https://py" + "pi.org/simple", "cd /ro" + "ot/"])
def test_the_search_finds(text: str) -> None:
    assert HOSTS.search(text) or PATHS.search(text)


@pytest.mark.parametrize("text", ["/models/work/x", "docs/work/", "~/work/", "frame/work", "$HOME/work/x", "./work/"])
def test_the_search_spares(text: str) -> None:
    assert not HOSTS.search(text)
    assert not PATHS.search(text)


def test_links_between_documents_lead_somewhere() -> None:
    broken = []
    for path in tracked_files():
        if path.suffix != ".md":
            continue
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
            if "://" not in target and not target.startswith("mailto:") and not (path.parent / target).exists():
                broken.append(f"{path.relative_to(ROOT)}: {target}")
    assert broken == []


def test_tests_stay_on_the_loopback_interface() -> None:
    with socket.socket() as probe, pytest.raises(RuntimeError, match="loopback"):
        probe.connect(("192.0.2.1", 80))
