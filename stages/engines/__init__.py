"""Engines: the only things that hold a model.

Each protocol says what a stage may ask of a model. The runner opens engines (in this process, or as
Ray actors) and hands stages something that answers the same methods; batches are formed inside one
call, so a call's answer does not depend on what else is in flight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from scipy.sparse import csr_array

    from stages.concepts.settings import ConceptsSettings
    from stages.features.settings import FeaturesSettings, Pooling

TokenIds = Sequence[int]


@dataclass(frozen=True)
class LogLikelihoods:
    """Per request: summed target log-probabilities, nats, float64 [n]; tokens scored, int64 [n]."""

    sums: NDArray[np.float64]
    counts: NDArray[np.int64]

    def mean_losses(self) -> NDArray[np.float64]:
        r"""Mean negative log-likelihood per scored token, nats; NaN where none was scored.

        .. math:: L(y \mid x) = -\frac{1}{n} \sum_{i=1}^{n} \log p(y_i \mid x, y_{<i})

        Source: Selective Reflection-Tuning (arXiv 2402.10110), Eq. 2.
        """
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(self.counts > 0, -self.sums / self.counts, np.nan)


@dataclass(frozen=True)
class FirstTokens:
    """What a model would say first after each prompt.

    Attributes:
        log_probs: of the chosen ids, nats, float64 [n, chosen].
        greedy: id of the most probable token, int64 [n].
    """

    log_probs: NDArray[np.float64]
    greedy: NDArray[np.int64]


class ScoreRequest(NamedTuple):
    """Score `target` ids after `prompt` ids; with an empty prompt the first target isn't scored."""

    prompt: TokenIds
    target: TokenIds


@dataclass(frozen=True)
class Sampling:
    """How text is drawn. Temperature 0 is greedy.

    Attributes:
        max_new_tokens: a longer text is cut.
        temperature: of the softmax.
        top_p: mass of the nucleus.
        schema: a JSON schema, as JSON text, that the text keeps to; None: free text. An engine that
            can't keep to one refuses it.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    schema: str | None = None


class GenerationRequest(NamedTuple):
    """Prompt ids, and the seed of this row and purpose (so text doesn't depend on neighbours)."""

    prompt: TokenIds
    seed: int


class Usage(NamedTuple):
    """Tokens of a prompt and of the reply to it, as whoever generated it counts them."""

    prompt_tokens: int
    generated_tokens: int


FinishReason = Literal["stop", "length", "content_filter"]


@dataclass(frozen=True)
class Completion:
    """Generated ids (end marker left out), their text, why they ended, their log-probability.

    An endpoint gives no ids and no log-probability: there they are empty and NaN. `usage` is there
    where messages were asked for, unless an endpoint doesn't report it. `end_id` is the end marker
    that was drawn, None where none was or nobody said.
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    log_prob: float
    usage: Usage | None = None
    end_id: int | None = None


@dataclass(frozen=True)
class MaskedSequence:
    """A token sequence and which of its tokens count (content, not template).

    Attributes:
        ids: of the tokens that are read.
        keep: of each, whether it counts.
        truncated: whether tokens that would count lay beyond what is read.
    """

    ids: TokenIds
    keep: Sequence[bool]
    truncated: bool = False


@dataclass(frozen=True)
class RowFeatures:
    """What rows activate, against what the targets activate.

    Attributes:
        by_task: similarity to each task, float64 [rows, tasks].
        by_target: similarity to each target row, float32 [rows, targets]; None: not asked for.
        active: active latents of each row, int32, ascending; None: not asked for.
    """

    by_task: NDArray[np.float64]
    by_target: NDArray[np.float32] | None
    active: list[NDArray[np.int32]] | None


@dataclass(frozen=True)
class LatentCounts:
    """By latent, rows and tokens that activate it, int64 [latents]."""

    rows: NDArray[np.int64]
    tokens: NDArray[np.int64]


@dataclass(frozen=True)
class RowConcepts:
    """The concepts of a row's tokens and of the row, strongest first.

    Attributes:
        ids: latents, int32 [tokens, slots]; -1 where a slot holds none.
        scores: attributions, float32 [tokens, slots]; 0 there.
        row_ids: latents of the row, int32.
        row_scores: their mean attributions, float32.
    """

    ids: NDArray[np.int32]
    scores: NDArray[np.float32]
    row_ids: NDArray[np.int32]
    row_scores: NDArray[np.float32]


@dataclass(frozen=True)
class Embedded:
    """L2-normalised float32 vectors [n, d], and in how many chunks each text was embedded [n]."""

    vectors: NDArray[np.float32]
    chunks: NDArray[np.int64]


class TokenScorer(Protocol):
    """Log-likelihoods of given tokens, and what follows from them."""

    async def score(self, requests: Sequence[ScoreRequest]) -> LogLikelihoods:
        """Log-likelihood of every request's target, in input order."""
        ...

    async def first_tokens(self, prompts: Sequence[TokenIds], chosen: TokenIds) -> FirstTokens:
        """Log-probabilities of chosen ids as the token after every prompt, in input order."""
        ...

    async def projected_gradients(
        self, requests: Sequence[ScoreRequest], rank: int, dimensions: int, seed: int
    ) -> NDArray[np.float32]:
        """Projected adapter gradient of every target's mean loss, float32 [n, dimensions]."""
        ...

    async def gradient_norms(self, requests: Sequence[ScoreRequest]) -> NDArray[np.float64]:
        """L2 norm of the gradient of every target's summed loss, input embeddings, [n]."""
        ...


class TextGenerator(Protocol):
    """Text after a prompt."""

    async def generate(
        self, requests: Sequence[GenerationRequest], sampling: Sampling
    ) -> list[Completion]:
        """One completion a request, in input order."""
        ...


class FeatureReader(Protocol):
    """What a model holds in its residual stream after one block."""

    async def activations(
        self, sequences: Sequence[MaskedSequence], layer: int
    ) -> NDArray[np.float32]:
        """Residual stream of every kept token, float32 [tokens, d], rows in order."""
        ...

    async def mean_states(
        self, sequences: Sequence[MaskedSequence], layer: int | None
    ) -> NDArray[np.float32]:
        """Mean residual stream of every row's kept tokens, float32 [rows, d]; None: last block."""
        ...

    async def features(
        self,
        sequences: Sequence[MaskedSequence],
        layer: int,
        dictionary: str,
        prototypes: str,
        settings: FeaturesSettings,
    ) -> RowFeatures:
        """Similarities to the targets, and active latents; artifacts by the URL of their folder."""
        ...

    async def pooled_codes(
        self, sequences: Sequence[MaskedSequence], layer: int, dictionary: str, pooling: Pooling
    ) -> csr_array:
        """Pooled code of every row, float32 [rows, latents]."""
        ...

    async def latent_counts(
        self, sequences: Sequence[MaskedSequence], layer: int, dictionary: str
    ) -> LatentCounts:
        """How many of these rows, and of their tokens, activate each latent."""
        ...

    async def concepts(
        self,
        sequences: Sequence[MaskedSequence],
        layer: int,
        dictionary: str,
        settings: ConceptsSettings,
    ) -> list[RowConcepts]:
        """Latents that bear on each kept token's next one, in input order."""
        ...

    async def latent_activations(
        self,
        sequences: Sequence[MaskedSequence],
        layer: int,
        dictionary: str,
        latents: Sequence[int],
    ) -> list[NDArray[np.float32]]:
        """Activations of some latents at every kept token, float32 [tokens, latents] a row."""
        ...


class Embedder(Protocol):
    """Sentence vectors."""

    async def embed(self, texts: Sequence[str]) -> Embedded:
        """One vector a text, in input order."""
        ...
