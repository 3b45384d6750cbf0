"""A process that compares answers as mathematics, one at a time (run by `checker`).

It limits itself: a comparison that takes longer than it may is ended by the kernel together with
the process, whatever library is computing, and also when the process that asked is gone.
"""

from __future__ import annotations

import logging
import resource
import signal
import sys
from multiprocessing.connection import Connection

from stages.pass_rate.checks import Verdict
from stages.pass_rate.mathematics import is_readable, math_verdict

_MEMORY = 4 << 30
"""Bytes of address space; a tower of powers can otherwise take all memory within its time."""


def main() -> None:
    """Answer what comes over the inherited connection until it is closed."""
    connection = Connection(int(sys.argv[1]))
    timeout_s = float(sys.argv[2])
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    import math_verify  # noqa: F401 - its time to load is no part of a comparison's

    # It warns that its own time limit is off.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    connection.send(None)
    while True:
        try:
            answer, text = connection.recv()
        except EOFError:
            return
        # Processor time: whether a comparison ends in time must not depend on what else runs.
        signal.setitimer(signal.ITIMER_PROF, timeout_s)
        found = _found(answer, text)
        signal.setitimer(signal.ITIMER_PROF, 0)
        connection.send(found)


def _found(answer: str, text: str | None) -> Verdict | bool:
    """The verdict on a text, or without one whether the answer can be read."""
    return is_readable(answer) if text is None else math_verdict(answer, text)


if __name__ == "__main__":
    main()
