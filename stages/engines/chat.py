"""Asking a model with messages: one protocol for models that run here and for endpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, get_args

from stages.engines import Completion, GenerationRequest, Sampling, TextGenerator, Usage
from stages.engines.model_files import cached_tokenizer
from stages.engines.settings import ModelSettings
from stages.engines.tokens import chat_tokens
from stages.errors import RowError
from stages.rows import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UnansweredCode = Literal[
    "endpoint_down",
    "connection_lost",
    "timeout",
    "rate_limited",
    "server_error",
    "bad_request",
    "bad_reply",
    "empty_choices",
    "reply_too_large",
    "invalid_unicode",
]
ChatCode = UnansweredCode | Literal["prompt_too_long", "chat_template", "content_filter", "refusal"]

UNANSWERED: frozenset[str] = frozenset(get_args(UnansweredCode))
"""Codes of a request that another run may find answered; the others say something of the row."""

RETRIED = UNANSWERED - {"bad_request", "reply_too_large", "invalid_unicode"}
"""Codes of what may pass by itself; the endpoint was tried several times."""


class ChatRequest(NamedTuple):
    """Messages that end with what is to be answered, and the seed of this row and purpose."""

    messages: Sequence[Message]
    seed: int


class ChatFailure(NamedTuple):
    """Why a request has no reply: a code, and what happened in words."""

    code: ChatCode
    detail: str

    def __str__(self) -> str:
        """As it stands in a row's status."""
        return f"{self.code}: {self.detail}"


class ChatGenerator(Protocol):
    """Replies to messages."""

    async def chat(
        self, requests: Sequence[ChatRequest], sampling: Sampling
    ) -> list[Completion | ChatFailure]:
        """One reply a request, or why there is none, in input order."""
        ...


class TemplatedChat:
    """A ChatGenerator from a TextGenerator: messages go through the model's own chat template."""

    def __init__(
        self,
        generator: TextGenerator,
        tokenizer: PreTrainedTokenizerBase,
        window: int,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Wrap a generator.

        Args:
            generator: the engine.
            tokenizer: the model's.
            window: tokens that prompt and reply may have together.
            options: variables of the chat template (`enable_thinking`).
        """
        self._generator = generator
        self._tokenizer = tokenizer
        self._window = window
        self._options = options

    async def chat(
        self, requests: Sequence[ChatRequest], sampling: Sampling
    ) -> list[Completion | ChatFailure]:
        """One reply a request, in input order; `chat_template` or `prompt_too_long` without one."""
        prompts = [self._prompt(request, sampling) for request in requests]
        asked = [prompt for prompt in prompts if isinstance(prompt, GenerationRequest)]
        made = iter(await self._generator.generate(asked, sampling) if asked else [])
        return [
            prompt if isinstance(prompt, ChatFailure) else _with_usage(next(made), prompt)
            for prompt in prompts
        ]

    def _prompt(self, request: ChatRequest, sampling: Sampling) -> GenerationRequest | ChatFailure:
        try:
            tokens = chat_tokens(
                self._tokenizer, request.messages, open_turn=True, options=self._options
            )
        except RowError as error:
            return ChatFailure("chat_template", str(error).removeprefix("chat_template: "))
        new = sampling.max_new_tokens
        if len(tokens.ids) + new > self._window:
            return ChatFailure(
                "prompt_too_long",
                f"{len(tokens.ids)} tokens and {new} new ones exceed {self._window}",
            )
        return GenerationRequest(tokens.ids, request.seed)


def chat_generator(
    engine: Any, model: ModelSettings, options: Mapping[str, Any] | None = None
) -> ChatGenerator:
    """What takes messages for a model: an endpoint's engine itself, or a template before one.

    Args:
        engine: an opened engine of kind `generator`.
        model: its settings.
        options: variables of the chat template of a model that runs here.
    """
    if model.endpoint is not None:
        chat: ChatGenerator = engine
        return chat
    return TemplatedChat(engine, cached_tokenizer(model), model.max_length, options)


def _with_usage(made: Completion, asked: GenerationRequest) -> Completion:
    return replace(made, usage=Usage(len(asked.prompt), len(made.token_ids)))
