"""Checking answers: matching here, mathematics in processes that can be ended.

The processes are started by name rather than forked or spawned: a fork would copy the threads'
locks of a model library, a spawn would run the user's own script again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe
from queue import LifoQueue
from types import TracebackType
from typing import Any

from stages.errors import StageError
from stages.pass_rate.checks import Case, Check, Verdict, matched, unmatchable

_LIVENESS_S = 1.0


class AnswerChecker:
    """Gives verdicts on answers; a context manager, at whose end no process is left.

    It can be used from any thread. Processes start with the first answer that is checked as
    mathematics.
    """

    def __init__(self, timeout_s: float = 5.0, processes: int | None = None) -> None:
        """Keep the limits.

        Args:
            timeout_s: processor seconds that one comparison as mathematics may take.
            processes: that compare at the same time; None: one a core, at most 4.
        """
        self._timeout_s = timeout_s
        self._processes = processes or min(4, os.cpu_count() or 1)
        self._idle: LifoQueue[_Worker | None] = LifoQueue()
        for _ in range(self._processes):
            self._idle.put(None)
        self._working: set[_Worker] = set()
        self._closed = False

    def __enter__(self) -> AnswerChecker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the processes, whatever they are doing."""
        self._closed = True
        for worker in tuple(self._working):
            worker.end()

    def verdicts(self, cases: Sequence[Case]) -> list[Verdict]:
        """One verdict a case, in order; never `truncated`, which a text doesn't show.

        Raises:
            StageError: a process can't be started.
        """
        found: list[Verdict] = ["unverified"] * len(cases)
        mathematics = [i for i, case in enumerate(cases) if case.check == "math"]
        asked = [(cases[i].answer, cases[i].text) for i in mathematics]
        for place, verdict in zip(mathematics, self._compared(asked), strict=True):
            found[place] = verdict or "unverified"
        for place, case in enumerate(cases):
            if case.check != "math":
                found[place] = matched(case)
        return found

    def unusable(self, answers: Sequence[tuple[Check, str]]) -> list[str | None]:
        """Why a reference answer can't be checked against, or None where it can, in order.

        Raises:
            StageError: a process can't be started.
        """
        asked = [(answer, None) for check, answer in answers if check == "math"]
        readable = iter(self._compared(asked))
        return [
            (None if next(readable) else "math-verify reads no mathematics in it")
            if check == "math"
            else unmatchable(check, answer)
            for check, answer in answers
        ]

    def _compared(self, asked: Sequence[tuple[str, str | None]]) -> list[Any]:
        """What a worker finds for each pair; None where it was ended over it."""
        if not asked:
            return []
        with ThreadPoolExecutor(min(self._processes, len(asked))) as threads:
            return list(threads.map(self._found, asked))

    def _found(self, pair: tuple[str, str | None]) -> Any:
        worker = self._idle.get()
        try:
            # A process that was ended by something else says nothing about this pair: once more.
            for _ in range(2):
                worker = worker or self._started()
                try:
                    return worker.ask(pair)
                except _Ended:
                    ended, worker = worker, None
                    self._working.discard(ended)
                    if ended.end() == -signal.SIGPROF:
                        break
            return None
        finally:
            self._idle.put(worker)

    def _started(self) -> _Worker:
        worker = _Worker(self._timeout_s)
        self._working.add(worker)
        if self._closed:
            worker.end()
            raise StageError("answers were still being checked when the checker was closed")
        return worker


class _Ended(Exception):
    """The process is gone."""


class _Worker:
    """A process that compares, and the way to talk to it."""

    def __init__(self, timeout_s: float) -> None:
        self._pipe, theirs = Pipe()
        name = theirs.fileno()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "stages.pass_rate.worker", str(name), str(timeout_s)],
            pass_fds=[name],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            # Else the order of sets, and with it how long a comparison takes, is another each time.
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "0"},
        )
        theirs.close()
        try:
            self._received()
        except _Ended as error:
            raise StageError(
                "the process that compares answers as mathematics didn't start (exit code "
                f"{self.end()}; its own words are on stderr): see that "
                f"`{sys.executable} -c 'import math_verify'` works"
            ) from error

    def ask(self, pair: tuple[str, str | None]) -> Any:
        """What the process finds for the pair.

        Raises:
            _Ended: it ended over it, or before.
        """
        try:
            self._pipe.send(pair)
        except OSError as error:
            raise _Ended from error
        return self._received()

    def end(self) -> int:
        """End the process where it hasn't ended; its exit code, negative for a signal."""
        self._process.kill()
        return self._process.wait()

    def _received(self) -> Any:
        try:
            # Another process that was forked meanwhile may hold the pipe's other end open.
            while not self._pipe.poll(_LIVENESS_S):
                if self._process.poll() is not None:
                    raise _Ended
            return self._pipe.recv()
        except (EOFError, OSError) as error:
            raise _Ended from error
