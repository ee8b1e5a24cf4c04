"""How much memory is still to be had: the machine's, or the container's where that is less. Linux only."""

from __future__ import annotations

import re
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_AVAILABLE = re.compile(r"^MemAvailable:\s+(\d+) kB$", re.MULTILINE)
_INACTIVE_FILE = re.compile(r"^inactive_file (\d+)$", re.MULTILINE)


def available_memory(meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int | None:
    """Bytes, or None where the system does not tell."""
    known = [size for size in (_of_machine(meminfo), _of_container(cgroup)) if size is not None]
    return min(known, default=None)


def _of_machine(meminfo: Path) -> int | None:
    found = _AVAILABLE.search(_text(meminfo))
    return None if found is None else int(found[1]) << 10


def _of_container(cgroup: Path) -> int | None:
    """By version 2 of control groups. Pages of files that were read once go when others need them."""
    limit, used = _text(cgroup / "memory.max").strip(), _text(cgroup / "memory.current").strip()
    if not limit.isdecimal() or not used.isdecimal():
        return None  # no limit, "max", or no such files
    inactive = _INACTIVE_FILE.search(_text(cgroup / "memory.stat"))
    return max(0, int(limit) - int(used) + (0 if inactive is None else int(inactive[1])))


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
