"""Several processes that fit one model: each takes its rows of every batch, and their gradients are averaged.

Shuffles, binarisation and noise are functions of the step and of the place of a row in the joined batch, so any
number of processes climbs what one process climbs on the joined batch; only the order of sums differs.
"""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch

# Its functions take the group that exists when it is imported as a default value, and would keep that group and
# its threads for ever: DistributedDataParallel imports it when the processes are joined, so it is imported before.
import torch.distributed.nn.functional
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from training.errors import BatchUneven

STEPS_BETWEEN_AGREEMENTS: Final = 10
"""A request to stop reaches one process before the others; they agree on it every so many steps, as asking at each
would cost more than a small step does."""


@dataclass(frozen=True)
class Processes:
    """This process among those that fit one model. Without arguments: it is alone.

    Args:
        rank: Its number, from 0. The first one writes.
        size: How many there are.
        local_rank: Its number on its machine: that of its GPU.
        control: Group for what the processes agree on, on the CPU.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    control: distributed.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and talks to the person."""
        return self.rank == 0

    def rows(self, batch_size: int) -> slice:
        """Return this process's rows of a joined batch.

        Raises:
            BatchUneven: If the batch cannot be divided equally; the mean of means would not be the mean.

        Example:
            >>> Processes(rank=1, size=4).rows(20)
            slice(5, 10, None)
        """
        share, rest = divmod(batch_size, self.size)
        if rest:
            raise BatchUneven(batch_size=batch_size, num_processes=self.size)
        return slice(self.rank * share, (self.rank + 1) * share)

    def device(self, chosen: torch.device) -> torch.device:
        """Return this process's own device of the kind that was chosen."""
        if chosen.type != "cuda":
            return chosen
        # Where a launcher shows each process its own GPU alone, that one has number 0.
        own = torch.device("cuda", self.local_rank if self.local_rank < torch.cuda.device_count() else 0)
        torch.cuda.set_device(own)
        return own

    def joined_mean(self, values: Tensor) -> Tensor:
        """Return the mean of the processes' values, the same everywhere; without gradient."""
        if self.size == 1:
            return values
        return self.joined_sum(values) / self.size

    def joined_sum(self, values: Tensor) -> Tensor:
        """Return the sum of the processes' values, the same everywhere; without gradient."""
        if self.size == 1:
            return values
        total = values.detach().clone()
        distributed.all_reduce(total, group=self.control if total.device.type == "cpu" else None)
        return total

    def agree(self, *, is_wanted: bool) -> bool:
        """Return whether any process wants it; all must ask at the same step."""
        return bool(self.joined_sum(torch.tensor(int(is_wanted))).item())

    def wait(self) -> None:
        """Return when all processes have come here."""
        self.agree(is_wanted=False)

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Let the first process run the block before the others do: what it writes, they find."""
        if not self.is_first:
            self.wait()
        yield
        if self.is_first:
            self.wait()

    def divided(self, objective: nn.Module, device: torch.device) -> nn.Module:
        """Return a module whose backward pass averages the gradients of all processes."""
        if self.size == 1:
            return objective
        return DistributedDataParallel(
            objective, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True
        )


ALONE: Final = Processes()
"""The only process of a run."""


@contextmanager
def joined(device_type: str) -> Iterator[Processes]:
    """Join the processes that torchrun or Ray Train started with this one, if any; leave them at the end.

    A group of gloo ends with its last reference, and until then its threads hold the tensors of the last sum. Such
    a thread that lets go of one while the interpreter ends takes the process with it (SIGABRT after all was done),
    so nothing may keep a group: neither what is left here, nor the caller its `Processes`.

    Args:
        device_type: Where to compute, `cpu` or `cuda`; decides between gloo and NCCL.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    is_ours = not distributed.is_initialized()  # Ray Train has joined them before it calls us
    if is_ours:
        distributed.init_process_group("nccl" if device_type == "cuda" else "gloo")
    try:
        yield Processes(
            rank=distributed.get_rank(),
            size=distributed.get_world_size(),
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
            control=distributed.new_group(backend="gloo"),
        )
    finally:
        if is_ours:
            distributed.destroy_process_group()
            gc.collect()  # DistributedDataParallel and what it divides refer to each other
