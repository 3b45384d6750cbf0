"""Asking the student: what it says of the versions of many rows, in one engine call."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from stages.difficulty.losses import ResponseLoss, instruction_losses, response_losses
from stages.engines import TokenScorer
from stages.errors import RowError
from stages.reflection.record import Version

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Student:
    """Scores versions; what can't be scored keeps None, and the reason as its error."""

    def __init__(
        self,
        engine: TokenScorer,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        *,
        ratio: bool,
    ) -> None:
        """Keep the engine; `ratio`: score the denominator of r-IFD too."""
        self._engine = engine
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._ratio = ratio

    async def score_responses(self, versions: Iterable[Version]) -> None:
        """L(y|x) and L(y) of every version that hasn't them."""
        asked = [version for version in versions if version.ifd is None]
        if not asked:
            return
        losses = await response_losses(
            self._engine, self._tokenizer, [one.messages for one in asked], self._max_length
        )
        for version, loss in zip(asked, losses, strict=True):
            if isinstance(loss, RowError):
                version.error = loss
            else:
                version.ifd = as_column(loss)

    async def score_instructions(self, versions: Iterable[Version]) -> None:
        """L(x|y'), and L(x) where the ratio is wanted, of every version that hasn't them."""
        asked = [version for version in versions if version.rifd is None]
        if not asked:
            return
        losses = await instruction_losses(
            self._engine,
            self._tokenizer,
            [one.messages for one in asked],
            self._max_length,
            alone=self._ratio,
        )
        for version, loss in zip(asked, losses, strict=True):
            if not isinstance(loss, RowError):
                version.rifd = loss


def as_column(loss: ResponseLoss) -> ResponseLoss:
    """Losses rounded as the columns of difficulty hold them.

    So a row's scores and verdicts are the same whether its losses are read or computed.
    """
    conditional, alone = np.array([loss.given_prompt, loss.alone], np.float32).tolist()
    return ResponseLoss(conditional, alone, loss.tokens, loss.truncated)
