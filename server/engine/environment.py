"""Environment variables that the engine's process starts with; they act on libraries before Python runs."""

from __future__ import annotations

from collections.abc import Mapping

_HUGE_PAGES = "glibc.malloc.hugetlb=1"


def engine_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` with the engine's defaults added; what the operator has set stays.

    Huge pages: a decode step reads every weight once, and with 4 KiB pages much of that time goes into address
    translation. They are asked for where the kernel's policy is "madvise", in glibc (which oneDNN's packed weights
    and the KV cache come from) and in torch's own allocator.

    OpenMP: idle workers spin before they sleep. libgomp's default is long enough that a step on shared cores waits for
    a worker that cannot run because another process's worker spins in its place; this one outlasts the gap between two
    operators and little more.
    """
    result = dict(environment)
    tunables = result.get("GLIBC_TUNABLES", "")
    if "glibc.malloc.hugetlb" not in tunables:
        result["GLIBC_TUNABLES"] = f"{tunables}:{_HUGE_PAGES}" if tunables else _HUGE_PAGES
    result.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if "OMP_WAIT_POLICY" not in result:
        result.setdefault("GOMP_SPINCOUNT", "10000")
    return result
