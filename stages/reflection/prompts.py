"""What the teacher is asked, in wording that comes from a file: the project's own, or the user's.

The row's texts go in as message content, which is encoded with special tokens disabled, so a row
can't forge a turn. Everything is in user turns: several chat templates refuse a system turn.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import cached_property
from importlib import resources
from string import Formatter
from typing import Annotated, Literal

import yaml
from pydantic import AfterValidator, Field, ValidationError

from stages.base import Settings
from stages.errors import ConfigError
from stages.reflection.settings import Form
from stages.rows import Message, canonical_json, instruction, response
from stages.storage import read_file

Purpose = Literal["instruction", "answer", "response"]
"""Phase 1; phase 1's second call where the reply is `whole`; phase 2."""

INSTRUCTION_TAG, RESPONSE_TAG = "new_instruction", "new_response"
"""Names of the reply's parts: tags, or keys of the JSON object."""


def _with_fields(*names: str) -> AfterValidator:
    """Checks that a text is there and holds exactly these fields."""

    def check(text: str) -> str:
        if not text.strip():
            raise ValueError("the text is empty")
        try:
            held = {
                f"{field}{'!' if conversion else ''}{':' if form else ''}"
                for _, field, form, conversion in Formatter().parse(text)
                if field is not None
            }
        except ValueError as error:
            raise ValueError(f"{error}; a literal brace is written twice") from error
        known = ", ".join(f"{{{name}}}" for name in names) or "none"
        for field in sorted(held - set(names)):
            raise ValueError(
                f"the field {{{field}}} is unknown (its fields are {known}); a literal brace is "
                "written twice"
            )
        for field in sorted(set(names) - held):
            raise ValueError(f"the field {{{field}}} is missing (its fields are {known})")
        return text

    return AfterValidator(check)


_Exchange = Annotated[str, _with_fields("context", "instruction", "response", "form")]
_Plain = Annotated[str, _with_fields()]


class Example(Settings):
    """A task and a more demanding version of it."""

    task: str = Field(min_length=1)
    harder: str = Field(min_length=1)


class Prompts(Settings):
    """The texts of a prompts file; `stages/reflection/prompts.yaml` says what each is for."""

    version: Literal[1]
    instruction: _Exchange
    response: _Exchange
    context: Annotated[str, _with_fields("turns")]
    tagged_form: Annotated[str, _with_fields("parts")]
    json_form: Annotated[str, _with_fields("parts")]
    new_instruction: _Plain
    new_answer: _Plain
    new_response: _Plain
    whole_instruction: Annotated[str, _with_fields("context", "instruction")]
    whole_context: Annotated[str, _with_fields("turns")]
    whole_examples: tuple[Example, ...]
    whole_answer: Annotated[str, _with_fields("instruction")]
    whole_response: _Plain

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the texts, wherever the file lies and however it is laid out."""
        return hashlib.sha256(canonical_json(self.model_dump(mode="json")).encode()).hexdigest()

    @cached_property
    def stand_ins(self) -> frozenset[str]:
        """What stands for a part where the form is shown, white space squeezed and case folded."""
        texts = (self.new_instruction, self.new_answer, self.new_response)
        return frozenset(squeezed(text.format()) for text in texts)

    @cached_property
    def own_texts(self) -> tuple[str, ...]:
        """Sentences of the prompts, to be known again in a reply that repeats them; squeezed.

        The tasks of the examples are among them: a small model may repeat one as its own.
        """
        texts = (
            self.instruction,
            self.response,
            self.tagged_form,
            self.json_form,
            self.whole_instruction,
            self.whole_answer,
            self.whole_response,
        )
        literal = [piece for text in texts for piece, _, _, _ in Formatter().parse(text)]
        sentences = (
            squeezed(sentence)
            for text in (*literal, *(example.harder for example in self.whole_examples))
            for sentence in re.split(r"(?<=[.?!:])\s|\n\n", text)
        )
        return tuple(dict.fromkeys(text for text in sentences if len(text) >= 30))

    def instruction_prompt(self, messages: Sequence[Message], reply: Form) -> list[Message]:
        """Phase 1: ask for a harder instruction and, but for `whole`, its response."""
        if reply != "whole":
            parts = {INSTRUCTION_TAG: self.new_instruction, RESPONSE_TAG: self.new_answer}
            return [_user(self._exchange(self.instruction, messages, reply, parts))]
        shown = [
            turn
            for example in self.whole_examples
            for turn in (_user(self._task("", example.task)), _assistant(example.harder))
        ]
        context = _filled(self.whole_context, messages)
        return [*shown, _user(self._task(context, instruction(messages) or ""))]

    def answer_prompt(self, messages: Sequence[Message]) -> list[Message]:
        """Phase 1 with `whole` replies, second call: the new instruction itself, to be answered."""
        asked = self.whole_answer.format(instruction=instruction(messages))
        return [*_before(messages), _user(asked)]

    def response_prompt(self, messages: Sequence[Message], reply: Form) -> list[Message]:
        """Phase 2: ask for a better response to the same instruction; the teacher sees the old."""
        if reply == "whole":
            return [*messages, _user(self.whole_response.format())]
        parts = {RESPONSE_TAG: self.new_response}
        return [_user(self._exchange(self.response, messages, reply, parts))]

    def _exchange(
        self, text: str, messages: Sequence[Message], reply: Form, parts: dict[str, str]
    ) -> str:
        return text.format(
            context=_filled(self.context, messages),
            instruction=instruction(messages),
            response=response(messages),
            form=self._form(reply, parts),
        ).strip()

    def _form(self, reply: Form, parts: dict[str, str]) -> str:
        if reply == "json":
            keys = (f'"{name}" ({stand_in.format()})' for name, stand_in in parts.items())
            return self.json_form.format(parts=", ".join(keys))
        tags = (f"<{name}>\n{stand_in.format()}\n</{name}>" for name, stand_in in parts.items())
        return self.tagged_form.format(parts="\n".join(tags))

    def _task(self, context: str, task: str) -> str:
        return self.whole_instruction.format(context=context, instruction=task)


def default_prompts_file() -> str:
    """The text of the file that holds the project's own wording."""
    return resources.files("stages.reflection").joinpath("prompts.yaml").read_text("utf-8")


def read_prompts(path: str | None) -> Prompts:
    """The prompts of a file, by path or fsspec URL; None: the project's own.

    Raises:
        ConfigError: the file is absent or no YAML, or a text or a field of one is missing or
            unknown.
    """
    where = path or "the default prompts"
    try:
        value = yaml.safe_load(default_prompts_file() if path is None else read_file(path))
    except FileNotFoundError as error:
        raise ConfigError(f"reflection.prompts: {path} doesn't exist; check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"reflection.prompts: {path} is no valid YAML: {error}") from error
    except OSError as error:
        raise ConfigError(f"reflection.prompts: cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"reflection.prompts: {where} holds no texts by name")
    try:
        return Prompts.model_validate(value)
    except ValidationError as error:
        mistakes = "; ".join(map(_explained, error.errors()))
        raise ConfigError(
            f"reflection.prompts: {where}: {mistakes} (`tamis prompts` prints a complete file)"
        ) from error


def squeezed(text: str) -> str:
    """A text with white space squeezed and case folded: equal for equal words."""
    return " ".join(text.split()).casefold()


def _explained(mistake: object) -> str:
    assert isinstance(mistake, dict)
    place = ".".join(str(part) for part in mistake["loc"])
    if mistake["type"] == "extra_forbidden":
        return f"{place}: no text is called so"
    if mistake["type"] == "missing":
        return f"{place}: the text is missing"
    return f"{place}: {str(mistake['msg']).removeprefix('Value error, ')}"


def _filled(text: str, messages: Sequence[Message]) -> str:
    """The text about earlier turns, or nothing where there are none."""
    turns = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in _before(messages))
    return text.format(turns=turns) if turns else ""


def _before(messages: Sequence[Message]) -> list[Message]:
    """The turns before the instruction, which the response follows directly."""
    return list(messages[:-2])


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}
