"""What a person sees while pilots train: a line every few seconds."""

from __future__ import annotations

import time

from rich.console import Console

from pipeline.pilot.runner import Progress
from pipeline.progress import LINE_EVERY_S, duration


class PilotLines:
    """A line every few seconds, and one after the last training.

    Args:
        console: where to write.
    """

    def __init__(self, console: Console) -> None:
        """Keep where to write."""
        self._console = console
        self._last = 0.0

    def __call__(self, progress: Progress) -> None:
        """Show where trainings stand."""
        now = time.monotonic()
        if now - self._last >= LINE_EVERY_S or progress.done == progress.of:
            self._last = now
            self._console.print(progress_line(progress), highlight=False, soft_wrap=True)


def progress_line(progress: Progress) -> str:
    """Where trainings stand, in a line."""
    left = ""
    if progress.rows_per_second and progress.rows < progress.rows_of:
        seconds = (progress.rows_of - progress.rows) / progress.rows_per_second
        left = f", about {duration(seconds)} left"
    return (
        f"pilot {progress.done}/{progress.of}: loss {progress.loss:.4f}, "
        f"{progress.rows:,} of {progress.rows_of:,} rows, {progress.rows_per_second:,.0f} rows/s"
        f"{left}"
    )
