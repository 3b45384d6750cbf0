"""Files with which the usual trainers read the data set as it is.

Where a trainer would drop part of a row without saying so (calls of tools, reasoning, loss masks),
no file is written for it, and the card says why.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from stages.emission.shards import FOLDERS, Schema
from stages.emission.splits import VALIDATION

_TRL = Path(__file__).with_name("trl_sft.txt")
_EVERY = "It trains on every assistant turn, and on nothing else"
_AXOLOTL_NOTE = (
    "# Merge into an Axolotl config. `path` is relative to where axolotl is started, and a run "
    "calls the\n# data set's folder so: put its own path, or its name on the Hub, there.\n"
)


@dataclass(frozen=True)
class TrainerFiles:
    """Files by name, and in words which trainers read the data set and which can't."""

    files: Mapping[str, bytes]
    notes: list[str] = field(default_factory=list)


def trainer_files(name: str, schema: Schema, splits: Mapping[str, Any]) -> TrainerFiles:
    """What TRL, Axolotl and LLaMA-Factory need.

    Args:
        name: of the data set.
        schema: of its rows.
        splits: the splits that were written.
    """
    made: dict[str, bytes] = {}
    notes = []
    for trainer, file, write, fits in (
        ("TRL", "trainers/trl_sft.py", _trl, _fits_trl),
        ("Axolotl", "trainers/axolotl.yaml", _axolotl, _fits_axolotl),
        ("LLaMA-Factory", "dataset_info.json", _llama_factory, _fits_llama_factory),
    ):
        why_not = fits(schema)
        if why_not is None:
            made[file] = write(name, schema, splits)
            notes.append(f"{trainer}: `{file}`. {_trained(trainer, schema)}.")
        else:
            notes.append(f"{trainer}: no file, because {why_not}.")
    return TrainerFiles(made, notes)


def _fits_trl(schema: Schema) -> str | None:
    return _lost(schema, {"role", "content", "name"})


def _fits_axolotl(schema: Schema) -> str | None:
    if schema.layout.form == "prompt_completion":
        return "it reads no lists of turns in `prompt` and `completion`"
    if schema.layout.optional:
        return f"its `alpaca` type reads no `{'` and no `'.join(schema.layout.optional)}`"
    return _lost(schema, {"role", "content", "name", "train"})


def _fits_llama_factory(schema: Schema) -> str | None:
    if schema.layout.form == "prompt_completion":
        return "it reads no lists of turns in `prompt` and `completion`"
    return _lost(schema, {"role", "content", "name"})


def _trained(trainer: str, schema: Schema) -> str:
    """Which turns have a loss."""
    if schema.layout.form == "prompt_completion":
        return "It trains on the completion alone"
    if trainer == "TRL":
        return (
            f"{_EVERY}; where the model's chat template doesn't mark them, each becomes an example "
            "of its own, after what comes before it"
        )
    if trainer == "LLaMA-Factory":
        return f"{_EVERY}, while `train_on_prompt` and `mask_history` stay false, their default"
    if "train" in schema.layout.turn:
        return "It trains on the turns whose `train` is true, and on assistant turns without one"
    return _EVERY


def _lost(schema: Schema, read: set[str]) -> str | None:
    """Why a trainer that reads these fields of a turn would lose something, or None."""
    fields = sorted(set(schema.layout.turn) - read) if schema.layout.form != "alpaca" else []
    columns = ["tools"] if schema.tools else []
    lost = fields + columns
    return (
        f"it would lose {' and '.join(f'`{name}`' for name in lost)} of some rows" if lost else None
    )


def _trl(name: str, schema: Schema, splits: Mapping[str, Any]) -> bytes:
    return _TRL.read_bytes()


def _axolotl(name: str, schema: Schema, splits: Mapping[str, Any]) -> bytes:
    if schema.layout.form == "alpaca":
        kind: dict[str, Any] = {"type": "alpaca"}
    else:
        kind = {
            "type": "chat_template",
            "field_messages": "messages",
            "message_property_mappings": {"role": "role", "content": "content"},
            "roles_to_train": ["assistant"],
            "train_on_eos": "turn",
        }
        if "train" in schema.layout.turn:
            kind["message_field_training"] = "train"
    value: dict[str, Any] = {
        key: [{"path": "dataset", "name": "default", "split": split, **kind}]
        for split in splits
        for key in ["test_datasets" if split == VALIDATION else "datasets"]
    }
    value["train_on_inputs"] = False
    return (_AXOLOTL_NOTE + yaml.safe_dump(value, sort_keys=False)).encode()


def _llama_factory(name: str, schema: Schema, splits: Mapping[str, Any]) -> bytes:
    """`dataset_info.json`: pass the data set's folder as `dataset_dir`."""
    if schema.layout.form == "alpaca":
        columns = {"prompt": "instruction", "query": "input", "response": "output"}
        columns |= {name: name for name in schema.layout.optional}
        how: dict[str, Any] = {"formatting": "alpaca", "columns": columns}
    else:
        how = {
            "formatting": "sharegpt",
            "columns": {"messages": "messages"},
            "tags": {
                "role_tag": "role",
                "content_tag": "content",
                "user_tag": "user",
                "assistant_tag": "assistant",
                "observation_tag": "tool",
                "system_tag": "system",
            },
        }
    value = {
        f"{name}-{split}" if split == VALIDATION else name: {"file_name": FOLDERS[split], **how}
        for split in splits
    }
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
