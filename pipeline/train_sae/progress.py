"""What a person sees while an autoencoder trains: one live line on a terminal, else one a while."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from pipeline.progress import LINE_EVERY_S, duration
from pipeline.train_sae.runner import Progress


class TrainingLines:
    """A line every few seconds, and one at the last step.

    Args:
        console: where to write.
    """

    def __init__(self, console: Console) -> None:
        """Keep where to write."""
        self._console = console
        self._last = 0.0

    def __call__(self, progress: Progress) -> None:
        """Show where training stands."""
        now = time.monotonic()
        if now - self._last >= LINE_EVERY_S or progress.step == progress.steps:
            self._last = now
            self._console.print(progress_line(progress), highlight=False, soft_wrap=True)

    def __enter__(self) -> Self:
        """Nothing to open."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Nothing to close."""


class TrainingLive:
    """A line that is drawn anew in place.

    Args:
        console: a terminal.
    """

    def __init__(self, console: Console) -> None:
        """Keep where to draw."""
        self._line = ""
        self._live = Live(
            console=console, refresh_per_second=4, get_renderable=lambda: Text(self._line)
        )

    def __call__(self, progress: Progress) -> None:
        """Show where training stands."""
        self._line = progress_line(progress)

    def __enter__(self) -> Self:
        """Take the terminal."""
        self._live.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the terminal back."""
        self._live.__exit__(kind, error, trace)


def progress_line(progress: Progress) -> str:
    """Where training stands, in a line."""
    left = ""
    if progress.tokens_per_second and progress.step < progress.steps:
        tokens = progress.tokens / progress.step * (progress.steps - progress.step)
        left = f", about {duration(tokens / progress.tokens_per_second)} left"
    return (
        f"step {progress.step}/{progress.steps}: {progress.tokens:,} tokens, "
        f"{progress.tokens_per_second:,.0f} tokens/s, FVU {progress.fvu:.4f}, "
        f"L0 {progress.l0:.1f}, dead {progress.dead_share:.1%}{left}"
    )
