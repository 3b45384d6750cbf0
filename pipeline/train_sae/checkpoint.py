"""Checkpoints of a training: one file, which appears whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from pipeline.train_sae.rows import Place
from stages.errors import StageError
from stages.storage import Store

if TYPE_CHECKING:
    import torch

    from stages.dictionary.buffer import ActivationBuffer
    from stages.dictionary.train import Trainer, TrainingConfig, TrainingPoint

CHECKPOINT = "checkpoint.safetensors"
_NUMBERS = "numbers"


@dataclass
class TrainingState:
    """All that training goes on from.

    Attributes:
        trainer: parameters and moments.
        buffer: activations that were read and not trained on yet.
        place: the last row that was read.
        read: activations read.
        points: measures of earlier steps.
    """

    trainer: Trainer
    buffer: ActivationBuffer
    place: Place = field(default_factory=Place)
    read: int = 0
    points: list[TrainingPoint] = field(default_factory=list)


def training_state(
    store: Store, config: TrainingConfig, capacity: int, seed: int, device: str
) -> TrainingState:
    """The last checkpoint's, or that of a training that hasn't begun.

    Args:
        store: the training's folder.
        config: of the trainer.
        capacity: of the buffer.
        seed: of directions and order.
        device: where to train.

    Raises:
        StageError: the checkpoint is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    from stages.dictionary.buffer import ActivationBuffer
    from stages.dictionary.train import Trainer, TrainingPoint

    if not store.exists(CHECKPOINT):
        buffer = ActivationBuffer(capacity, config.d_in, seed)
        return TrainingState(Trainer(config, seed, device), buffer)
    try:
        tensors = load(store.read_bytes(CHECKPOINT))
        numbers = json.loads(bytes(tensors.pop(_NUMBERS).numpy()))
        trainer, held = _under("trainer.", tensors), _under("buffer.", tensors)
        return TrainingState(
            Trainer.from_state(config, trainer, numbers["trainer"], device),
            ActivationBuffer.from_state(capacity, seed, held, numbers["buffer"]),
            Place(**numbers["place"]),
            numbers["read"],
            [TrainingPoint(*point) for point in numbers["points"]],
        )
    except (SafetensorError, KeyError, ValueError) as error:
        raise StageError(
            f"{store.url}/{CHECKPOINT} is damaged ({error}): put back a whole copy, or remove "
            "it to train from the start",
            stage="train-sae",
        ) from error


def write_checkpoint(store: Store, state: TrainingState) -> None:
    """Replace the checkpoint."""
    import torch
    from safetensors.torch import save

    trainer, trainer_numbers = state.trainer.state()
    held, buffer_numbers = state.buffer.state()
    numbers = {
        "trainer": trainer_numbers,
        "buffer": buffer_numbers,
        "place": asdict(state.place),
        "read": state.read,
        "points": state.points,
    }
    tensors = {
        **{f"trainer.{name}": tensor for name, tensor in trainer.items()},
        **{f"buffer.{name}": tensor for name, tensor in held.items()},
        _NUMBERS: torch.tensor(list(json.dumps(numbers).encode()), dtype=torch.uint8),
    }
    data = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
    store.write_bytes(CHECKPOINT, data)


def _under(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
