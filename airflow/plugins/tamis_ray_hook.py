"""The Jobs REST interface of a Ray cluster, by an Airflow connection.

Interface: Ray's OpenAPI description of `/api/jobs`, and `/api/v0/logs`, by which `ray logs` reads;
read and run with Ray 2.60.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, NamedTuple

import httpx
from airflow.sdk import BaseHook, Connection

ENDED = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})
LINES = 1000
"""The last lines of a driver's output, which are all that is read of it."""
_TIMEOUT_S = 20.0
_STARTING_S = 60.0
"""A head answers some seconds before it can take jobs."""
_STOP_S = 25.0
"""Less than the 30 s that a triggerer gives to the end of a trigger."""


class Unanswered(Exception):
    """The cluster didn't answer, or answered that it can't now: to be tried again."""


class Refused(Exception):
    """The cluster doesn't accept the token or the request: trying again doesn't help."""


class Job(NamedTuple):
    """A job as the cluster knows it.

    Attributes:
        status: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED.
        message: what Ray says about it.
        exit_status: of its driver, None while it runs or where it had none.
        node: id of its driver's node, None where it had no driver yet.
        submitted: by the head's clock, in seconds since the epoch; None where it doesn't say.
    """

    status: str
    message: str
    exit_status: int | None
    node: str | None
    submitted: float | None

    @property
    def is_over(self) -> bool:
        """Whether it has ended, in whatever way."""
        return self.status in ENDED


class RayJobs:
    """Jobs of one cluster.

    Every method raises `Unanswered` or `Refused` where the cluster doesn't do what it is asked.
    """

    def __init__(self, connection: Connection) -> None:
        """Take the address and the token; nothing is sent yet."""
        self._conn_id = connection.conn_id
        self._address = dashboard_address(connection)
        token = connection.password
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    async def job(self, job_id: str) -> Job | None:
        """A job; None where the cluster knows none of that id."""
        reply = await self._asked("GET", f"/api/jobs/{job_id}")
        if reply.status_code == httpx.codes.NOT_FOUND:
            return None
        value = self._object(reply)
        submitted = value.get("start_time")
        return Job(
            status=str(value.get("status")),
            message=str(value.get("message") or ""),
            exit_status=value.get("driver_exit_code"),
            node=value.get("driver_node_id"),
            submitted=None if submitted is None else submitted / 1000,
        )

    async def submit(
        self,
        job_id: str,
        entrypoint: str,
        runtime_env: Mapping[str, Any],
        metadata: Mapping[str, str],
    ) -> None:
        """Submit a job, unless one of that id is under way; one that has ended makes way."""
        body = {
            "submission_id": job_id,
            "entrypoint": entrypoint,
            "runtime_env": runtime_env,
            "metadata": metadata,
        }
        try:
            async with asyncio.timeout(_STARTING_S):
                while True:
                    try:
                        self._object(await self._asked("POST", "/api/jobs/", body))
                    except Unanswered as error:
                        # Ray has no status of its own for either.
                        if "already exists" in str(error):
                            found = await self.job(job_id)
                            if found is not None and not found.is_over:
                                return
                            await self._delete(job_id)
                        elif "No available agent" not in str(error):
                            raise
                        await asyncio.sleep(1)
                    else:
                        return
        except TimeoutError as error:
            raise Unanswered(
                f"{self._address} takes no job within {_STARTING_S:.0f} s; check the head's log "
                "(dashboard_agent.log); a retry finds the job if it was taken after all"
            ) from error

    async def tail(self, job_id: str, job: Job) -> str:
        """The last `LINES` lines that a job's driver has written so far, the last perhaps in part.

        The whole output, as `/api/jobs/ID/logs` gives it, may be larger than the memory here, and
        isn't given at all where one byte of it is no UTF-8.
        """
        if job.node is None:
            return ""
        query = httpx.QueryParams(node_id=job.node, submission_id=job_id, lines=LINES)
        reply = await self._asked("GET", f"/api/v0/logs/file?{query}")
        if not reply.is_success:
            raise Unanswered(f"{self._address} has no log of it")
        return reply.content.decode(errors="replace")

    async def stop(self, job_id: str) -> Job | None:
        """A job after it was stopped, by SIGTERM and seconds later SIGKILL; None for one unknown.

        A cluster that doesn't answer is asked again for `_STOP_S`.
        """
        is_asked, said = False, "it doesn't end"
        try:
            async with asyncio.timeout(_STOP_S):
                while True:
                    try:
                        if not is_asked:
                            await self._asked("POST", f"/api/jobs/{job_id}/stop")
                            is_asked = True
                        found = await self.job(job_id)
                        if found is None or found.is_over:
                            return found
                    except Unanswered as error:
                        said = str(error)
                    await asyncio.sleep(0.5)
        except TimeoutError as error:
            raise Unanswered(
                f"job {job_id} was to be stopped and may still run after {_STOP_S:.0f} s: {said}; "
                f"stop it by `ray job stop {job_id} --address {self._address}`"
            ) from error

    async def _delete(self, job_id: str) -> None:
        """Forget a job that has ended, so that its id is free, or another client's by now."""
        try:
            await self._asked("DELETE", f"/api/jobs/{job_id}")
        except Unanswered:
            # Ray has no status of its own for a job that is gone or, submitted anew, under way.
            found = await self.job(job_id)
            if found is not None and found.is_over:
                raise

    def _object(self, reply: httpx.Response) -> Mapping[str, Any]:
        """The object that a reply holds."""
        try:
            value = reply.json() if reply.is_success else None
        except ValueError:
            value = None
        if not isinstance(value, Mapping):
            raise Refused(
                f"{self._address} is no Ray dashboard: it answers {reply.request.url.path} with "
                f"status {reply.status_code} and no JSON object; correct the host of the "
                f"connection {self._conn_id}"
            )
        return value

    async def _asked(self, method: str, path: str, body: Any = None) -> httpx.Response:
        address = self._address
        try:
            async with httpx.AsyncClient(timeout=_TIMEOUT_S, headers=self._headers) as client:
                reply = await client.request(method, address + path, json=body)
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise Refused(
                f"the host of the connection {self._conn_id} is no URL: {address} ({error}); give "
                "the dashboard's address, such as http://head:8265"
            ) from error
        except httpx.TransportError as error:
            raise Unanswered(
                f"no Ray dashboard answers at {address} ({error}); check that the head runs and "
                f"that the connection {self._conn_id} names its dashboard"
            ) from error
        if reply.is_success or reply.status_code == httpx.codes.NOT_FOUND:
            return reply
        # Ray sends tracebacks, and adds a full stop of its own.
        lines = [line for line in reply.text.splitlines() if line.strip(". ")] or ["nothing"]
        said = f"{reply.status_code}, {lines[-1][:300]}"
        if reply.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            raise Refused(
                f"{address} refuses the token: {said}; put the cluster's token into the password "
                f"of the connection {self._conn_id}"
            )
        if reply.is_server_error:
            raise Unanswered(f"{address} can't answer {method} {path}: {said}")
        raise Refused(f"{address} refuses {method} {path}: {said}")


class RayJobsHook(BaseHook):
    """The cluster that a connection names.

    The connection's host is the dashboard's address (`http://head:8265`, or a host and port), its
    password the cluster's token where there is one.
    """

    conn_name_attr = "conn_id"
    default_conn_name = "ray_default"

    def __init__(self, conn_id: str = default_conn_name) -> None:
        """Name the connection."""
        super().__init__()
        self.conn_id = conn_id

    def get_conn(self) -> RayJobs:
        """The cluster's jobs, from a task."""
        return RayJobs(self.get_connection(self.conn_id))

    async def aget_conn(self) -> RayJobs:
        """The cluster's jobs, from a trigger."""
        return RayJobs(await self.aget_connection(self.conn_id))


def dashboard_address(connection: Connection) -> str:
    """The dashboard's address that a connection gives.

    Raises:
        Refused: it gives none.
    """
    host = (connection.host or "").rstrip("/")
    if not host:
        raise Refused(
            f"the connection {connection.conn_id} has no host: give the dashboard's address, such "
            "as http://head:8265"
        )
    if "://" not in host:
        scheme = connection.schema or "http"
        host = f"{scheme}://{host}"
    return f"{host}:{connection.port}" if connection.port else host
