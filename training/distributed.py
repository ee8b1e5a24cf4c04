"""Several processes as one trainer: `torchrun --nproc-per-node 2 -m training train …` (gloo on the CPU, NCCL on CUDA).

A process that torchrun did not start is rank 0 of 1, and every collective is then the identity. Whatever goes wrong
on one rank ends all of them with one sentence: the first to fail takes a number in the group's key-value store and
speaks; the others see that number, or the broken connection, and leave quietly.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store

from training.build import resolve_device
from training.errors import LostRankError, RecipeError

_FAILURES = "quill/failures"
_POLL_SECONDS = 1.0
_ADDRESS = ("MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True)
class Distributed:
    """This process among those of the run, and the device that it works on."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    _done: threading.Event = field(default_factory=threading.Event)

    @property
    def is_main(self) -> bool:
        """The one rank that writes, prints and logs."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """`values`, summed over the ranks in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def from_main(self, number: int) -> int:
        """Rank 0's number, on every rank."""
        if self.world_size == 1:
            return number
        value = torch.tensor([number], dtype=torch.int64, device=self.device)
        dist.broadcast(value, src=0)
        return int(value.item())

    def close(self) -> None:
        """Leaves the group; the other ranks do so too."""
        self._done.set()
        if self.world_size > 1:
            dist.destroy_process_group()

    @contextlib.contextmanager
    def failing_together(self) -> Iterator[None]:
        """Around all the work of a run: see the module's first lines. Ranks that stay quiet exit with status 1."""
        if self.world_size == 1:
            yield
            return
        store = dist.distributed_c10d._get_default_store()
        watcher = threading.Thread(target=self._leave_after_failure, args=(store,), name="failures", daemon=True)
        watcher.start()
        try:
            yield
        except BaseException as error:
            self._done.set()
            if _take_number(store) > 1:
                raise SystemExit(1) from None
            if _is_lost_connection(error):
                raise LostRankError(f"rank {self.rank} lost the others; start the run again, it resumes") from error
            raise
        self.close()

    def _leave_after_failure(self, store: Store) -> None:
        """A rank that waits for a failed one inside NCCL runs no Python; this thread ends it."""
        while not self._done.wait(_POLL_SECONDS):
            try:
                failed = store.check([_FAILURES])
            except RuntimeError:  # the store went away with the rank or the launcher that kept it
                failed = True
            if failed and not self._done.wait(_POLL_SECONDS):  # time to notice by itself and clean up
                sys.stdout.flush()
                os._exit(1)


def _count(environment: Mapping[str, str], name: str, default: str = "") -> int:
    text = environment.get(name, default)
    if not text.isdecimal() or (name == "WORLD_SIZE" and int(text) < 1):
        raise RecipeError(f"{name} is {text!r} but must be a number; unset it, or start the run by torchrun")
    return int(text)


def init_distributed(device_name: str, environment: Mapping[str, str] = os.environ) -> Distributed:
    """Joins the group that torchrun's variables describe. Raises RecipeError for a device that is not there."""
    world_size = _count(environment, "WORLD_SIZE", "1")
    if world_size == 1:
        return Distributed(_prepared(resolve_device(device_name)))
    missing = [name for name in ("RANK", "LOCAL_RANK", *_ADDRESS) if name not in environment]
    if missing:
        raise RecipeError(f"WORLD_SIZE is {world_size} but {missing[0]} is not set; start the run by torchrun")
    rank, local_rank = _count(environment, "RANK"), _count(environment, "LOCAL_RANK")
    device = _prepared(_local_device(device_name, local_rank))
    if device.type == "cuda":
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    return Distributed(device, rank, world_size)


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor that FSDP has split, gathered from all ranks; other tensors as they are. Collective."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def shard_like(full: Tensor, like: Tensor) -> Tensor:
    """This rank's part of `full`, split as `like` is; every rank holds the same `full`, so nothing is sent."""
    mesh = getattr(like, "device_mesh", None)
    if mesh is None:
        return full.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full.to(like.device), mesh, getattr(like, "placements"), src_data_rank=None)  # noqa: B009


def _local_device(name: str, local_rank: int) -> torch.device:
    """The machine's GPU number `local_rank`, or the CPU."""
    device = resolve_device(name)
    if device.type != "cuda":
        return device
    if device.index is not None:
        raise RecipeError(f"train.device is {name}, one GPU for all ranks; use cuda, and each rank takes its own")
    if local_rank >= torch.cuda.device_count():
        raise RecipeError(
            f"this machine has {torch.cuda.device_count()} GPUs; start torchrun with --nproc-per-node no larger"
        )
    return torch.device("cuda", local_rank)


def _prepared(device: torch.device) -> torch.device:
    """Makes it the device of this process's unnamed CUDA work."""
    if device.type != "cuda":
        return device
    device = torch.device("cuda", device.index if device.index is not None else torch.cuda.current_device())
    torch.cuda.set_device(device)
    return device


def _take_number(store: Store) -> int:
    try:
        return int(store.add(_FAILURES, 1))
    except RuntimeError:
        return 2  # the store is gone: whoever kept it has failed before and has spoken


def _is_lost_connection(error: BaseException) -> bool:
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and "gloo" in str(error))
