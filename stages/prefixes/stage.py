"""The prefixes stage: one solution a prompt by the model itself, of most only the first tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from stages.base import Columns, EngineSpec
from stages.engines import Completion, GenerationRequest, Sampling
from stages.engines.model_files import cached_tokenizer
from stages.engines.settings import ModelSettings
from stages.engines.tokens import chat_tokens
from stages.errors import ConfigError, RowError, StageError
from stages.pass_rate.prompts import question
from stages.prefixes.settings import PrefixesSettings
from stages.rows import LABEL, OK, Message, group_id, key_hash, messages_of, status_field
from stages.storage import Store

Kind = Literal["prefix", "full"]

_ADDS = pa.schema(
    [
        ("prefix_kind", LABEL),
        ("prefix_prompt_ids", pa.list_(pa.int32())),
        ("prefix_ids", pa.list_(pa.int32())),
        ("prefix_text", pa.string()),
        ("prefix_sampled_tokens", pa.int32()),
        status_field("prefixes"),
    ]
)


@dataclass(frozen=True)
class Asked:
    """A prompt that can be solved.

    Attributes:
        kind: whether a prefix or the whole solution is kept.
        sampled: the prompt that is solved, its header of an open assistant turn included.
        trained: the prompt that what is kept is trained after.
        seed: of the sample; a prefix and a whole solution of one prompt begin alike.
    """

    kind: Kind
    sampled: list[int]
    trained: list[int]
    seed: int


class PrefixesStage:
    """Samples one solution a prompt, cut on the sampler's own token ids.

    Text that is decoded, cut and encoded again can have other ids and another length, so ids are
    what is kept. Rows that share a prompt share its sample.

    Source: UPFT (arXiv 2503.02875), section 3.3: prefixes are trained on without checking them; a
    share of whole solutions under the ordinary prompt keeps the model from forgetting to finish.
    """

    name = "prefixes"
    version = 2
    on_targets = False

    def __init__(
        self, settings: PrefixesSettings, models: Mapping[str, ModelSettings], seed: int
    ) -> None:
        """Look up the model.

        Args:
            settings: the recipe's section.
            models: the recipe's models by name.
            seed: the run's; a sample is drawn from it and the prompt.

        Raises:
            ConfigError: solutions leave no room for a prompt in the model's window.
        """
        self.settings = settings
        self._model = models[settings.model]
        self._seed = seed
        drawn = {"tokens": settings.share < 1, "max_new_tokens": settings.share > 0}
        for field, used in drawn.items():
            if used and getattr(settings, field) >= self._model.max_length:
                raise ConfigError(
                    f"prefixes.{field}: {getattr(settings, field)} leaves no room for a prompt in "
                    f"models.{settings.model}.max_length={self._model.max_length}"
                )

    def check(self) -> None:
        """See that the tokenizer has an end-of-text token where one is put behind prefixes.

        Raises:
            ConfigError: it has none.
        """
        if self.settings.end_token and cached_tokenizer(self._model).eos_token_id is None:
            raise ConfigError(
                f"models.{self.settings.model}: its tokenizer has no end-of-text token, which "
                "prefixes.end_token puts behind a prefix; set it to false"
            )

    def columns(self) -> Columns:
        """Reads the text that stands; adds ids to train on, their text, and what they cost."""
        return Columns(("id", "effective_messages"), _ADDS)

    def engines(self) -> Mapping[str, EngineSpec]:
        """The model that solves."""
        return {"model": EngineSpec("generator", self.settings.model, self._model)}

    def artifacts(self) -> tuple[str, ...]:
        """None."""
        return ()

    async def process(
        self, rows: pa.Table, engines: Mapping[str, Any], artifacts: Mapping[str, Store]
    ) -> pa.Table:
        """A prefix or a whole solution of every row's prompt, in order.

        Raises:
            StageError: the cache doesn't say how a solution ended.
        """
        asked = [self._asked(messages) for messages in messages_of(rows, "effective_messages")]
        drawn: dict[int, Completion] = {}
        lengths: dict[Kind, int] = {
            "prefix": self.settings.tokens,
            "full": self.settings.max_new_tokens,
        }
        for kind, tokens in lengths.items():
            requests = {
                place: GenerationRequest(one.sampled, one.seed)
                for place, one in enumerate(asked)
                if isinstance(one, Asked) and one.kind == kind
            }
            if requests:
                sampling = Sampling(tokens, self.settings.temperature, self.settings.top_p)
                completions = await engines["model"].generate(list(requests.values()), sampling)
                drawn |= dict(zip(requests, completions, strict=True))
        records = [
            {"prefixes_status": f"failed: {one}"}
            if isinstance(one, RowError)
            else self._record(one, drawn[place])
            for place, one in enumerate(asked)
        ]
        return pa.Table.from_pylist(records, schema=_ADDS)

    def _asked(self, messages: list[Message] | None) -> Asked | RowError:
        tokenizer, settings = cached_tokenizer(self._model), self.settings
        try:
            turns = question(messages or [], settings.request)
            ids = chat_tokens(tokenizer, turns, open_turn=True).ids
            prompt = group_id(messages or [], None)
            kind = self._kind(prompt)
            trained = ids
            if kind == "prefix":
                turns = question(messages or [], settings.prefix_request)
                trained = chat_tokens(tokenizer, turns, open_turn=True).ids
        except RowError as error:
            return error
        new = settings.tokens if kind == "prefix" else settings.max_new_tokens
        if len(ids) + new > self._model.max_length:
            return RowError(
                f"prompt_too_long: {len(ids)} tokens and {new} new ones exceed "
                f"{self._model.max_length}"
            )
        return Asked(kind, ids, trained, key_hash(f"{prompt}:prefix", self._seed))

    def _kind(self, prompt: str) -> Kind:
        """Whole solutions are drawn by hash, so that a row's kind depends on no other row."""
        whole = key_hash(f"{prompt}:whole", self._seed) < self.settings.share * 2**64
        return "full" if whole else "prefix"

    def _record(self, asked: Asked, completion: Completion) -> dict[str, Any]:
        ids = list(completion.token_ids)
        ended = completion.finish_reason == "stop"
        sampled = {"prefix_sampled_tokens": len(ids)}
        if not ids:
            return {"prefixes_status": "failed: empty: the model ended at once", **sampled}
        if asked.kind == "full" and not ended:
            status = f"unfinished: no end within max_new_tokens={self.settings.max_new_tokens}"
            return {"prefixes_status": status, **sampled}
        if ended:
            ids.append(self._drawn_end(completion))
        elif self.settings.end_token:
            ids.append(int(cached_tokenizer(self._model).eos_token_id))
        return {
            "prefix_kind": asked.kind,
            "prefix_prompt_ids": asked.trained,
            "prefix_ids": ids,
            "prefix_text": completion.text,
            "prefixes_status": OK,
            **sampled,
        }

    def _drawn_end(self, completion: Completion) -> int:
        """The end that the model drew: a model may know several, of which EOS is one."""
        if completion.end_id is None:
            raise StageError(
                "prefixes: the cache holds solutions of an earlier version of tamis, which don't "
                "say by which token they ended; name another execution.cache",
                stage=self.name,
            )
        return completion.end_id
