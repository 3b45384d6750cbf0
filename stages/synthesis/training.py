"""Training a generator of problems: the loss is on the problem, and solutions are never seen."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

from stages.engines.tokens import text_ids
from stages.errors import ConfigError
from stages.synthesis.headers import end_of_turn_ids, user_header_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TrainingExample(TypedDict):
    """A record as trl's SFTTrainer reads it: the loss is on the completion."""

    prompt: str
    completion: str


class TrainingForm:
    """How one model's template writes a problem.

    Attributes:
        header: text before the problem. A BOS that the tokenizer writes by itself is left out, so
            that the trainer's encoding has exactly one.
        end: text after it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Read it off the tokenizer's chat template.

        Raises:
            ConfigError: the template has no user header, or its text between problems has other
                ids than the template's own.
        """
        ids = user_header_ids(tokenizer)
        own: list[int] = tokenizer("")["input_ids"]
        bos = ids[:1] if own[:1] == ids[:1] else []
        self.header = str(tokenizer.decode(ids[len(bos) :]))
        end = end_of_turn_ids(tokenizer)
        self.end = str(tokenizer.decode(end))
        # Where the header's last characters merge with the problem's first ones, a generator would
        # be trained after other ids than those that it is given when it is sampled.
        whole = tokenizer(f"{self.header}How{self.end}")["input_ids"]
        if whole != [*ids, *text_ids(tokenizer, "How"), *end]:
            raise ConfigError(
                f"{tokenizer.name_or_path}: with a problem between them, its user header "
                f"{self.header!r} and end of turn {self.end!r} have other ids than by themselves, "
                "so that a generator trained on the text could not be sampled from the header; "
                "train a model whose template has no such seam (ChatML's has none)"
            )


def training_example(form: TrainingForm, problem: str) -> TrainingExample:
    """A problem as the continuation of the bare user header, as in ScaleDiff (arXiv 2509.21070)."""
    return {"prompt": form.header, "completion": problem.strip() + form.end}
