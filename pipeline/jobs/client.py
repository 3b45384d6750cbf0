"""The Jobs REST interface of a Ray cluster.

Interface: Ray's OpenAPI description of `/api/jobs` and `/api/packages`; read and run with Ray 2.60.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from stages.errors import ConfigError, StageError

ENDED = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})
_TIMEOUT_S = 30.0
_STARTING_S = 60.0
"""A head answers some seconds before it can take jobs."""


class Unanswered(StageError):
    """The cluster didn't answer, or answered that it can't now: to be tried again."""


class Job(NamedTuple):
    """A job as the cluster knows it.

    Attributes:
        id: submission id.
        status: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED.
        message: what Ray says about it.
        exit_status: of its driver, None while it runs or where it had none.
        entrypoint: its command.
        metadata: what it was submitted with.
    """

    id: str
    status: str
    message: str
    exit_status: int | None
    entrypoint: str
    metadata: Mapping[str, str]

    @property
    def is_over(self) -> bool:
        """Whether it has ended, in whatever way."""
        return self.status in ENDED


class JobsClient:
    """Talks to one cluster's dashboard; a context manager that ends its connections."""

    def __init__(self, address: str) -> None:
        """Find the token; nothing is sent yet.

        Args:
            address: of the dashboard, such as http://head:8265.

        Raises:
            ConfigError: the address is no HTTP address.
        """
        if not address.startswith(("http://", "https://")):
            raise ConfigError(
                f"--address {address}: give the address of the dashboard, such as http://head:8265"
            )
        self._address = address.rstrip("/")
        token = auth_token()
        try:
            self._http = httpx.Client(
                base_url=self._address,
                timeout=_TIMEOUT_S,
                headers={"Authorization": f"Bearer {token}"} if token else {},
            )
        except httpx.InvalidURL as error:
            raise ConfigError(
                f"--address {address} is no URL ({error}); give the address of the dashboard, such "
                "as http://head:8265"
            ) from error

    def __enter__(self) -> JobsClient:
        """The client itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the connections."""
        self._http.close()

    def job(self, job_id: str) -> Job | None:
        """A job; None where the cluster knows none of that id.

        Raises:
            TamisError: the cluster doesn't answer, or refuses.
        """
        reply = self._asked("GET", f"/api/jobs/{job_id}", missing=True)
        return None if reply.status_code == httpx.codes.NOT_FOUND else _job(self._object(reply))

    def submit(
        self,
        job_id: str,
        entrypoint: str,
        runtime_env: Mapping[str, Any],
        metadata: Mapping[str, str],
    ) -> bool:
        """Submit a job; False where another was submitted under that id before.

        Raises:
            TamisError: the cluster doesn't answer, or refuses.
        """
        body = {
            "submission_id": job_id,
            "entrypoint": entrypoint,
            "runtime_env": runtime_env,
            "metadata": metadata,
        }
        end = time.monotonic() + _STARTING_S
        while True:
            try:
                self._object(self._asked("POST", "/api/jobs/", json=body))
            except Unanswered as error:
                # Ray has no status of its own for either.
                if "already exists" in str(error):
                    return False
                if "No available agent" not in str(error) or time.monotonic() > end:
                    raise
                time.sleep(1)
            else:
                return True

    def delete(self, job_id: str) -> bool:
        """Forget a job that has ended, so that its id is free; False where it hasn't ended.

        Raises:
            TamisError: the cluster doesn't answer, or refuses.
        """
        try:
            self._asked("DELETE", f"/api/jobs/{job_id}", missing=True)
        except Unanswered as error:
            # Ray has no status of its own for it.
            if "non-terminal state" in str(error):
                return False
            raise
        return True

    def stop(self, job_id: str) -> None:
        """Ask a job to end: SIGTERM, and some seconds later SIGKILL.

        Raises:
            TamisError: the cluster doesn't answer, or refuses.
        """
        self._asked("POST", f"/api/jobs/{job_id}/stop", missing=True)

    def logs(self, job_id: str) -> str:
        """All that a job's driver has written so far.

        Raises:
            TamisError: the cluster doesn't answer, or refuses.
        """
        reply = self._asked("GET", f"/api/jobs/{job_id}/logs", missing=True)
        if reply.status_code == httpx.codes.NOT_FOUND:
            return ""
        return str(self._object(reply).get("logs") or "")

    def put_package(self, name: str, data: bytes) -> str:
        """Upload a package unless it is there; the URI that a runtime environment names it by.

        Raises:
            TamisError: the cluster doesn't answer, or refuses.
        """
        place = f"/api/packages/gcs/{name}"
        if self._asked("GET", place, missing=True).status_code == httpx.codes.NOT_FOUND:
            self._asked("PUT", place, content=data)
        return f"gcs://{name}"

    def _object(self, reply: httpx.Response) -> Mapping[str, Any]:
        """The object that a reply holds.

        Raises:
            ConfigError: it holds none, as that of another server.
        """
        try:
            value = reply.json()
        except ValueError:
            value = None
        if not isinstance(value, Mapping):
            raise ConfigError(
                f"{self._address} is no Ray dashboard: it answers {reply.request.url.path} with no "
                "JSON object; check --address (port 8265 unless it was changed)"
            )
        return value

    def _asked(
        self,
        method: str,
        path: str,
        *,
        missing: bool = False,
        json: Any = None,
        content: bytes | None = None,
    ) -> httpx.Response:
        try:
            reply = self._http.request(method, path, json=json, content=content)
        except httpx.TransportError as error:
            raise Unanswered(
                f"no Ray dashboard answers at {self._address} ({error}); check that the head runs "
                "and that --address names its dashboard (port 8265 unless it was changed)"
            ) from error
        if reply.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            raise ConfigError(
                f"{self._address} refuses the token: {_said(reply)}; set RAY_AUTH_TOKEN to the "
                "cluster's token, or RAY_AUTH_TOKEN_PATH to a file that holds it"
            )
        if reply.status_code == httpx.codes.NOT_FOUND and missing:
            return reply
        if reply.is_server_error:
            raise Unanswered(f"{self._address} can't answer {method} {path}: {_said(reply)}")
        if not reply.is_success:
            raise StageError(f"{self._address} refuses {method} {path}: {_said(reply)}")
        return reply


def auth_token() -> str | None:
    """The token that Ray's own clients would send, from the environment or Ray's file.

    Raises:
        ConfigError: RAY_AUTH_TOKEN_PATH names a file that isn't there.
    """
    if os.environ.get("RAY_AUTH_MODE") == "disabled":
        return None
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token.strip()
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    file = Path(named) if named else Path.home() / ".ray" / "auth_token"
    if file.is_file():
        return file.read_text().strip() or None
    if named:
        raise ConfigError(f"RAY_AUTH_TOKEN_PATH is {named}, and no file is there")
    return None


def _job(reply: Mapping[str, Any]) -> Job:
    return Job(
        id=str(reply.get("submission_id")),
        status=str(reply["status"]),
        message=str(reply.get("message") or ""),
        exit_status=reply.get("driver_exit_code"),
        entrypoint=str(reply.get("entrypoint") or ""),
        metadata=reply.get("metadata") or {},
    )


def _said(reply: httpx.Response) -> str:
    """The last line of a reply: Ray sends tracebacks."""
    lines = reply.text.strip().splitlines() or ["nothing"]
    return f"{reply.status_code}, {lines[-1][:300]}"
