"""A buffer that mixes a stream of activations.

Tokens of one text resemble each other, and batches of neighbours would pull an autoencoder to and
fro. The buffer holds many texts' tokens and hands them out in random order; it is filled again when
half of them are gone. Each activation that goes in comes out once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Self

import numpy as np
import torch
from torch import Tensor


class ActivationBuffer:
    """At most `capacity` activations of the stream, in a seeded random order.

    Its state can be taken and given back, and what it hands out then stays the same.
    """

    def __init__(self, capacity: int, width: int, seed: int) -> None:
        """Allocate it on the CPU, in float32.

        Args:
            capacity: Activations held at once.
            width: Of an activation, ``d``.
            seed: Of the order.
        """
        self._places = torch.empty(capacity, width)
        self._order = torch.zeros(0, dtype=torch.int64)
        self._free = torch.arange(capacity)
        self._rest = torch.empty(0, width)
        self._seed = seed
        self._fills = 0

    def __len__(self) -> int:
        """How many activations it holds and will hand out before it is filled again."""
        return len(self._order)

    @property
    def capacity(self) -> int:
        """How many it can hold."""
        return len(self._places)

    def fill(self, chunks: Iterator[Tensor]) -> None:
        """Take chunks of the stream until there is no room, then draw a new order of everything.

        Args:
            chunks: Activations ``[tokens, d]``; what doesn't fit of the last is kept for the next
                time.
        """
        added = []
        while len(self._free):
            if not len(self._rest):
                chunk = next(chunks, None)
                if chunk is None:
                    break
                self._rest = chunk
            room = min(len(self._free), len(self._rest))
            places, self._free = self._free[:room], self._free[room:]
            self._places[places] = self._rest[:room]
            self._rest = self._rest[room:].clone()
            added.append(places)
        if added:
            order = torch.cat([self._order, *added])
            draws = np.random.default_rng([self._seed, self._fills])
            self._order = order[torch.from_numpy(draws.permutation(len(order)))]
            self._fills += 1

    def take(self, count: int) -> Tensor:
        """The next activations, at most `count`, ``[count, d]``."""
        taken, self._order = self._order[:count], self._order[count:]
        self._free = torch.cat([self._free, taken])
        return self._places[taken]

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """What it holds in the order in which it leaves, what waits for room, and its fills."""
        tensors = {"held": self._places[self._order], "rest": self._rest}
        return tensors, {"fills": self._fills}

    @classmethod
    def from_state(
        cls, capacity: int, seed: int, tensors: Mapping[str, Tensor], numbers: Mapping[str, int]
    ) -> Self:
        """A buffer that goes on where another stood.

        Args:
            capacity: The other's.
            seed: The other's.
            tensors: The other's `state`.
            numbers: The other's `state`.
        """
        held = tensors["held"]
        buffer = cls(capacity, held.shape[1], seed)
        buffer._places[: len(held)] = held
        buffer._order, buffer._free = buffer._free[: len(held)], buffer._free[len(held) :]
        buffer._rest = tensors["rest"].clone()
        buffer._fills = numbers["fills"]
        return buffer


def mixed_batches(
    buffer: ActivationBuffer, chunks: Iterator[Tensor], batch: int
) -> Iterator[Tensor]:
    """Batches out of a buffer that is filled whenever half of it is gone, until the stream ends.

    Args:
        buffer: Empty, or given its state back.
        chunks: The stream, ``[tokens, d]`` each.
        batch: Activations in a batch; the last one may have fewer.
    """
    while True:
        if 2 * len(buffer) <= buffer.capacity:
            buffer.fill(chunks)
        if not len(buffer):
            return
        yield buffer.take(batch)
