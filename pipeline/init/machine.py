"""What this machine has to run models on."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """Cores, memory and GPUs.

    Attributes:
        cores: that this process may use.
        memory_gb: of the machine, in 10^9 bytes.
        gpus_gb: memory of each GPU, in 10^9 bytes.
    """

    cores: int
    memory_gb: float
    gpus_gb: tuple[float, ...] = ()

    def __str__(self) -> str:
        """As a person says it."""
        if not self.gpus_gb:
            return f"{self.cores} cores, {self.memory_gb:.0f} GB of memory, no GPU"
        each = ", ".join(f"{size:.0f} GB" for size in self.gpus_gb)
        return f"{self.cores} cores, {self.memory_gb:.0f} GB of memory, GPUs of {each}"


def this_machine() -> Machine:
    """The machine that this process runs on, with the GPUs that torch sees."""
    import psutil
    import torch

    gpus = [
        torch.cuda.get_device_properties(number).total_memory / 1e9
        for number in range(torch.cuda.device_count())
    ]
    return Machine(len(os.sched_getaffinity(0)), psutil.virtual_memory().total / 1e9, tuple(gpus))
