"""What a person sees while a run goes on: a live table on a terminal, else one line a while."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from pipeline.runner import Event

LINE_EVERY_S = 10.0


class Lines:
    """One line when a stage starts and ends, and one every few seconds in between.

    Args:
        console: where to write.
        every_shard: write a line for every committed shard.
    """

    def __init__(self, console: Console, *, every_shard: bool = False) -> None:
        """Keep where to write."""
        self._console = console
        self._every_shard = every_shard
        self._last = 0.0

    def __call__(self, event: Event) -> None:
        """Show one event."""
        now = time.monotonic()
        if event.kind == "shard" and not self._every_shard and now - self._last < LINE_EVERY_S:
            return
        self._last = now
        self._console.print(_line(event), highlight=False, soft_wrap=True)

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


class LiveTable:
    """A table of stages that is drawn anew in place."""

    def __init__(self, console: Console, stages: list[str]) -> None:
        """List the stages."""
        self._rows: dict[str, Event | None] = dict.fromkeys(stages)
        self._started: dict[str, float] = {}
        self._seen: dict[str, int] = {}
        self._live = Live(console=console, refresh_per_second=4, get_renderable=self._table)

    def __call__(self, event: Event) -> None:
        """Show one event."""
        self._started.setdefault(event.stage, time.monotonic())
        if event.kind == "shard":
            self._seen[event.stage] = self._seen.get(event.stage, 0) + event.rows
        self._rows[event.stage] = event

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

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for name, justify in (("stage", "left"), ("shards", "right"), ("rows", "right"),
                              ("rows/s", "right"), ("time", "right"), ("", "left")):  # fmt: skip
            table.add_column(name, justify="right" if justify == "right" else "left")
        for stage, event in self._rows.items():
            table.add_row(stage, *self._cells(stage, event))
        return table

    def _cells(self, stage: str, event: Event | None) -> tuple[str, str, str, str, str]:
        if event is None:
            return "", "", "", "", "[dim]waiting[/]"
        if event.kind == "kept":
            return "", str(event.rows), "", "", "[green]already there[/]"
        if event.kind == "done":
            return "", str(event.rows), "", duration(event.seconds), "[green]done[/]"
        elapsed = time.monotonic() - self._started[stage]
        rows = self._seen.get(stage, 0)
        speed = f"{rows / elapsed:.1f}" if rows and elapsed else ""
        left = ""
        if event.done and event.total > event.done and rows:
            left = f", about {duration(elapsed / event.done * (event.total - event.done))} left"
        shards = f"{event.done}/{event.total}" if event.total else ""
        return shards, str(rows or ""), speed, duration(elapsed), f"[yellow]running[/]{left}"


def _line(event: Event) -> str:
    if event.kind == "start":
        there = f", {event.done} already there" if event.done else ""
        return f"{event.stage}: {event.total} shards{there}" if event.total > 1 else event.stage
    if event.kind == "shard":
        return f"{event.stage}: {event.done}/{event.total} shards ({event.note})"
    if event.kind == "kept":
        return f"{event.stage}: nothing to do"
    return f"{event.stage}: done, {event.rows} rows in {duration(event.seconds)}"


def duration(seconds: float) -> str:
    """A time span as a person says it."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"
