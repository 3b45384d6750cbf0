"""Problems: what a generator writes after the bare header of a user's turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from stages.engines import Completion, GenerationRequest, Sampling, TextGenerator
from stages.rows import key_hash
from stages.synthesis.headers import end_of_turn_ids, special_ids, user_header_ids
from stages.synthesis.sample import Reject, Sample
from stages.synthesis.settings import GeneratorSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


async def sampled_problems(
    engine: TextGenerator,
    tokenizer: PreTrainedTokenizerBase,
    settings: GeneratorSettings,
    seed: int,
) -> tuple[list[Sample], int]:
    """All samples, each from its own seed, so that more samples keep the earlier ones.

    A problem ends where the template ends a user's turn, also with models that don't stop there.

    Args:
        engine: the generator's.
        tokenizer: the generator's.
        settings: how many, and how they are drawn.
        seed: the recipe's.

    Returns:
        The samples in order, and the tokens that were generated.

    Raises:
        ConfigError: the tokenizer's chat template has no user header.
        EngineError: the engine can't go on.
    """
    header = user_header_ids(tokenizer)
    requests = [
        GenerationRequest(header, key_hash(f"problem:{index}", seed))
        for index in range(settings.samples)
    ]
    sampling = Sampling(settings.max_new_tokens, settings.temperature, settings.top_p)
    completions = await engine.generate(requests, sampling)
    end, special = end_of_turn_ids(tokenizer), special_ids(tokenizer)
    samples = [
        _sample(index, done, tokenizer, end, special) for index, done in enumerate(completions)
    ]
    return samples, sum(len(done.token_ids) for done in completions)


def _sample(
    index: int,
    done: Completion,
    tokenizer: PreTrainedTokenizerBase,
    end: Sequence[int],
    special: frozenset[int],
) -> Sample:
    ids = list(done.token_ids)
    place = _first(ids, end)
    ended = place is not None or done.finish_reason == "stop"
    text = done.text if place is None else str(tokenizer.decode(ids[:place]))
    sample = Sample(index, text.strip())
    if not ended:
        sample.reject = Reject("unfinished")
    elif special.intersection(ids[:place]):
        sample.reject = Reject("special_token")
    return sample


def _first(ids: Sequence[int], run: Sequence[int]) -> int | None:
    """Where a run of ids begins; None where it isn't there."""
    places = range(len(ids) - len(run) + 1)
    return next((i for i in places if list(ids[i : i + len(run)]) == list(run)), None)
