"""Problems as prompts: for the teacher, and for the student that mustn't solve them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from stages.engines.tokens import chat_tokens
from stages.errors import ConfigError, RowError
from stages.pass_rate.prompts import question
from stages.rows import Message, group_id
from stages.synthesis.sample import Reject, Sample, remaining

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Asker:
    """How a model is asked to solve a problem.

    Attributes:
        tokenizer: the model's.
        request: a sentence after the problem and a blank line, or None.
        room: tokens that a prompt may have: the model's window without the reply.
        options: variables of the chat template.
    """

    tokenizer: PreTrainedTokenizerBase
    request: str | None
    room: int
    options: Mapping[str, Any] = field(default_factory=dict)

    def prompt(self, problem: str) -> list[int]:
        """The prompt's ids.

        Raises:
            ConfigError: the chat template refuses a user turn with these variables.
        """
        turns = asked_messages(problem, self.request)
        try:
            return chat_tokens(self.tokenizer, turns, open_turn=True, options=self.options).ids
        except RowError as error:
            raise ConfigError(f"{self.tokenizer.name_or_path}: {error}") from error

    def prompts(self, samples: Sequence[Sample]) -> list[tuple[Sample, list[int]]]:
        """Samples that are left, with their prompts; those without room for a reply are marked."""
        found = []
        for sample in remaining(samples):
            ids = self.prompt(sample.problem)
            if len(ids) <= self.room:
                found.append((sample, ids))
            else:
                sample.reject = Reject(
                    "prompt_too_long", f"{len(ids)} tokens, and there is room for {self.room}"
                )
        return found


def asked_messages(problem: str, request: str | None) -> list[Message]:
    """A problem as the user's turn, a request after it."""
    return question([{"role": "user", "content": problem}], request)


def text_id(sample: Sample) -> str:
    """What identifies a problem: the `group` that its row gets when it is ingested."""
    return group_id([{"role": "user", "content": sample.problem}], None)
