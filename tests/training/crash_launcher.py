"""A process that runs `python -m training …` in forked children and breaks them off where it is told to.

A fork costs milliseconds, an import of torch seconds. One JSON object a line comes in (`args`, `cwd`, `fault`) and
one goes out (`status`, `stderr`, `operations`). Without `page` no report.html is drawn, which takes longer than all
the rest. Faults count a child's file operations, in all its threads, from 0:

    {"kill_at": N}          SIGKILL before operation N
    {"kill_after": S}       SIGKILL after S seconds
    {"kill_when": PATTERN}  SIGKILL before the first operation at which such a path exists
    {"disk_full_at": N}     from operation N on no file can grow: the kernel refuses it (RLIMIT_FSIZE)
    {"refuse_at": N}        operation N alone fails with ENOSPC
    {"survey": FOLDER}      nothing is broken; `operations` has each name with a digest of FOLDER before it
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import io
import itertools
import json
import os
import resource
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import torch

import training.reporting.report_page
import training.run
from training import cli
from training.metrics import peak_flops

_MODULES = ("posix", "io", "_io", "safetensors._safetensors_rust")
_OPERATIONS = frozenset({
    "mkdir", "rename", "replace", "link", "symlink", "unlink", "remove", "rmdir", "truncate", "ftruncate", "chmod",
    "fchmod", "utime", "fsync", "fdatasync", "write", "writelines", "flush", "close", "__exit__", "open",
    "serialize_file", "sendfile", "copy_file_range",
})  # fmt: skip
_PLAIN_DESCRIPTORS = ("open", "close")  # posix.open and posix.close: around every fsync, and they change nothing


class Hook:
    """A profile function that meets every C function which can change the disk, before it is called."""

    def __init__(self, fault: dict[str, Any]) -> None:
        self.fault, self.seen = fault, []  # type: dict[str, Any], list[tuple[str, str]]
        self._count = itertools.count()

    def __call__(self, frame: FrameType, event: str, function: Any) -> None:
        if event == "c_call" and function.__name__ in _OPERATIONS and _is_file_operation(function):
            self._meet(next(self._count), function.__name__)

    def _meet(self, number: int, name: str) -> None:
        fault = self.fault
        if "survey" in fault:
            self.seen.append((name, digest(Path(fault["survey"]))))
        elif number == fault.get("kill_at") or ("kill_when" in fault and glob.glob(fault["kill_when"])):
            os.kill(os.getpid(), signal.SIGKILL)
        elif number == fault.get("disk_full_at"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        elif number == fault.get("refuse_at"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _is_file_operation(function: Any) -> bool:
    owner = getattr(function, "__self__", None)
    if owner is sys.stdout or owner is sys.stderr or isinstance(owner, io.BytesIO | io.StringIO):
        return False
    module = getattr(function, "__module__", None)
    if module == "posix" and function.__name__ in _PLAIN_DESCRIPTORS:
        return False
    return module in _MODULES or type(owner).__module__ in _MODULES


def digest(folder: Path) -> str:
    """Of the names and contents of all files below a folder."""
    whole = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        whole.update(os.fsencode(path) + b"\0")
        if path.is_file():
            whole.update(hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()


def call(args: list[str]) -> int:
    """The command line in this process. A crash that is no clear error ends as a traceback and status 99."""
    sys.argv = ["training", *args]
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
        return 99
    return 0


def child(command: dict[str, Any], stderr: int, report: int) -> None:
    """Never returns."""
    status = 99
    try:
        os.chdir(command["cwd"])
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(stderr, 2)
        if not command["page"]:
            setattr(training.reporting.report_page, "write_report", lambda run_dir: run_dir / "report.html")  # noqa: B010
        hook = Hook(command["fault"])
        if set(hook.fault) - {"kill_after"}:
            threading.setprofile(hook)
            sys.setprofile(hook)
        status = call(command["args"])
        sys.setprofile(None)
        sys.stderr.flush()
        os.close(2)
        os.close(stderr)
        with open(report, "w") as file:
            json.dump(hook.seen, file)
    finally:
        os._exit(status)


def run(command: dict[str, Any]) -> dict[str, Any]:
    with pipe() as (err_read, err_write), pipe() as (report_read, report_write):
        start, pid = time.monotonic(), os.fork()
        if pid == 0:
            child(command, err_write, report_write)
        os.close(err_write)
        os.close(report_write)
        stderr = read_all(err_read, pid, command["fault"].get("kill_after"))
        report = read_all(report_read, pid, None)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return {
        "status": status, "stderr": stderr.decode(errors="replace"), "seconds": time.monotonic() - start,
        "operations": json.loads(report or "[]"),
    }  # fmt: skip


@contextlib.contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    try:
        yield ends
    finally:
        for end in ends:
            with contextlib.suppress(OSError):  # closed already
                os.close(end)


def read_all(descriptor: int, pid: int, kill_after: float | None) -> bytes:
    """Until the other side closes; meanwhile the process is killed when its time has come."""
    parts = []
    deadline = None if kill_after is None else time.monotonic() + kill_after
    while True:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if select.select([descriptor], [], [], left)[0]:
            parts.append(os.read(descriptor, 1 << 16))
            if not parts[-1]:
                return b"".join(parts)
        else:
            os.kill(pid, signal.SIGKILL)
            deadline = None


def serve(answers: TextIO) -> None:
    for line in sys.stdin:
        command = json.loads(line)
        if command.get("here"):  # in this process, so that what is imported on the way is there for all children
            os.chdir(command["cwd"])
            answer = {"status": call(command["args"]), "stderr": "", "seconds": 0.0, "operations": []}
        else:
            answer = run(command)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.bfloat16):
        peak_flops(torch.device("cpu"), dtype)  # measured once in a process, and in none of its children
    with open(os.dup(1), "w") as channel:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        serve(channel)
