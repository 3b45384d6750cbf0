"""A prompt end at SIGTERM, as Ray and Kubernetes ask for seconds before they kill.

All that is finished is committed and all else can be made again, so there is nothing to wait for
but the locks that this process holds.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable

AT_END: dict[object, Callable[[], None]] = {}
"""By owner, what is still to be done before the process ends, in a second at most."""

EXIT_STATUS = 128 + signal.SIGTERM
_AT_LATEST_S = 1.5


def end_at_sigterm() -> None:
    """From now on, SIGTERM ends this process at once, after the calls of `AT_END`.

    A thread waits for the signal: a handler would wait until the main thread comes back from the
    library that it is in. The signal's own handler only has to exist; Ray puts one of its own in
    its place. Call it in the main thread.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    os.register_at_fork(before=_hold, after_in_parent=_let, after_in_child=_forget)
    threading.Thread(target=_wait, args=(read,), name="sigterm", daemon=True).start()


def _wait(read: int) -> None:
    while signal.SIGTERM not in os.read(read, 64):
        pass
    # Whoever should read stderr, or the storage of a lock, may block for ever.
    last = threading.Timer(_AT_LATEST_S, os._exit, [EXIT_STATUS])
    last.daemon = True
    last.start()
    try:
        for call in list(AT_END.values()):
            call()
        sys.stderr.write("ended by SIGTERM; the same command goes on from here\n")
        sys.stderr.flush()
    finally:
        os._exit(EXIT_STATUS)


def _hold() -> None:
    # A signal that comes between a child's birth and `_forget` would end its parent.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _let() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _forget() -> None:
    # A forked child would write its signals into its parent's pipe.
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _let()
