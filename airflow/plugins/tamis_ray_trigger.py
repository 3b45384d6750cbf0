"""Waiting for a Ray job in the triggerer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from airflow.triggers.base import BaseTrigger, TriggerEvent

from tamis_ray_hook import LINES, Job, RayJobs, RayJobsHook, Refused, Unanswered

_SILENCE_S = 300.0
"""How long a cluster may leave all questions unanswered."""
_WIDTH = 2000
"""Characters of a line that are shown."""


class RayJobTrigger(BaseTrigger):
    """Fires when a job is over, passing the tail of its driver's output on to the task's log."""

    def __init__(
        self, conn_id: str, job_id: str, deadline: float | None = None, poll_s: float = 5.0
    ) -> None:
        """Say what to wait for.

        Args:
            conn_id: connection of the cluster.
            job_id: submission id.
            deadline: seconds since the epoch at which the job is stopped; None for never.
            poll_s: seconds between two looks.
        """
        super().__init__()
        self.conn_id, self.job_id, self.deadline, self.poll_s = conn_id, job_id, deadline, poll_s
        self._seen: list[str] = []
        self._unread = False

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """The class's path and arguments."""
        return (
            "tamis_ray_trigger.RayJobTrigger",
            {
                "conn_id": self.conn_id,
                "job_id": self.job_id,
                "deadline": self.deadline,
                "poll_s": self.poll_s,
            },
        )

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """One event: the job, and why the wait is over (`ended`, `timeout`, `lost`, `refused`)."""
        yield TriggerEvent({"job": self.job_id, **await self._waited()})

    async def on_kill(self) -> None:
        """Stop the job of a task that a user has marked or cleared."""
        jobs = await RayJobsHook(self.conn_id).aget_conn()
        await jobs.stop(self.job_id)

    async def _waited(self) -> dict[str, str]:
        jobs = await RayJobsHook(self.conn_id).aget_conn()
        heard = time.monotonic()
        while True:
            try:
                job = await jobs.job(self.job_id)
                heard = time.monotonic()
                is_late = self._is_late(job)
                if is_late:
                    job = await jobs.stop(self.job_id)
            except Refused as error:
                return {"why": "refused", "error": str(error)}
            except Unanswered as error:
                if time.monotonic() - heard > _SILENCE_S:
                    return {"why": "lost", "error": str(error)}
                self.log.warning("%s", error)
                await asyncio.sleep(self.poll_s)
                continue
            if job is None:
                return {"why": "lost", "error": f"the cluster no longer knows job {self.job_id}"}
            # Asked before the log, so that that of a job which is over is whole.
            await self._show(jobs, job)
            if job.is_over:
                # It may have ended by itself while it was being stopped.
                return {"why": "timeout" if is_late and job.status == "STOPPED" else "ended"}
            await asyncio.sleep(self.poll_s)

    def _is_late(self, job: Job | None) -> bool:
        runs = job is not None and not job.is_over
        return runs and self.deadline is not None and time.time() > self.deadline

    async def _show(self, jobs: RayJobs, job: Job) -> None:
        """Write the lines that are new to the task's log, where the cluster gives them."""
        try:
            text = await jobs.tail(self.job_id, job)
        except (Refused, Unanswered) as error:
            if not self._unread:
                self.log.warning(
                    "the driver's output can't be shown; the job is waited for all the same: %s",
                    error,
                )
            self._unread = True
            return
        lines = text.split("\n")
        is_cut = len(lines) - (not lines[-1]) >= LINES
        # A line that is being written waits.
        last = lines.pop()
        new = unseen(self._seen, lines)
        self._seen = lines
        if is_cut and len(new) == len(lines):
            self.log.info(
                "(of the lines before, some are left out; `ray job logs %s` prints all)",
                self.job_id,
            )
        for line in [*new, last] if job.is_over and last else new:
            # Of a progress bar, what a terminal would show.
            self.log.info("%s", line.rstrip("\r").rpartition("\r")[2][:_WIDTH])


def unseen(seen: list[str], lines: list[str]) -> list[str]:
    """Lines of a log's tail that weren't in an earlier one.

    Exact while the log is shorter than its tail may be. In a longer one, whose start is cut, a
    whole tail of repetitions counts as seen.

    Args:
        seen: the earlier tail.
        lines: the tail now, which begins within the earlier one or after it.
    """
    overlaps = range(min(len(seen), len(lines)), 0, -1)
    return lines[next((n for n in overlaps if seen[-n:] == lines[:n]), 0) :]
