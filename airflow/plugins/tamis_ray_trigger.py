"""Waiting for a Ray job in the triggerer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from airflow.triggers.base import BaseTrigger, TriggerEvent

from tamis_ray_hook import RayJobsHook, Refused, Unanswered

_SILENCE_S = 300.0
"""How long a cluster may leave all questions unanswered."""


class RayJobTrigger(BaseTrigger):
    """Fires when a job is over, passing its driver's output on to the task's log."""

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
        jobs, shown = await RayJobsHook(self.conn_id).aget_conn(), 0
        heard = time.monotonic()
        while True:
            try:
                if self.deadline is not None and time.time() > self.deadline:
                    await jobs.stop(self.job_id)
                    return {"why": "timeout"}
                # Asked before the logs, so that those of a job that is over are whole.
                job = await jobs.job(self.job_id)
                text = await jobs.logs(self.job_id) if job else ""
                heard = time.monotonic()
            except Refused as error:
                return {"why": "refused", "error": str(error)}
            except Unanswered as error:
                if time.monotonic() - heard > _SILENCE_S:
                    return {"why": "lost", "error": str(error)}
                await asyncio.sleep(self.poll_s)
                continue
            # A line that is being written waits.
            end = len(text) if job is None or job.is_over else text.rfind("\n") + 1
            for line in text[shown:end].splitlines():
                self.log.info("%s", line)
            shown = end
            if job is None:
                return {"why": "lost", "error": f"the cluster no longer knows job {self.job_id}"}
            if job.is_over:
                return {"why": "ended"}
            await asyncio.sleep(self.poll_s)
