# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Workers of DataLoaders that outlive a SIGTERM to all processes of a job."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS = 10.0  # for which a worker goes on after a signal that is not its parent's


@contextmanager
def sigterm_blocked() -> Iterator[None]:
    """Blocks SIGTERM in this thread, and in the processes that it starts, which inherit that.

    They must call `ignore_sigterm_of_others`; where that does nothing, this does nothing.
    """
    if not hasattr(signal, "sigwaitinfo"):
        yield
        return
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def ignore_sigterm_of_others(worker_id: int = 0) -> None:
    """Makes a DataLoader's worker end at once by SIGTERM only if its parent has sent it.

    Schedulers signal all processes of a job, but training needs its workers until the next step
    boundary. After a signal of another process a worker ends after 10 seconds: that of its parent
    may have been lost, since signals of one kind do not queue, and a parent waits for its workers
    before it ends. A `worker_init_fn`; on systems without `sigwaitinfo`, such as macOS, it does
    nothing.

    It is for forked workers, started in `sigterm_blocked`: with other start methods the signal also
    reaches threads that exist before this is called, and ends the worker.

    Args:
        worker_id: not used.
    """
    if not hasattr(signal, "sigwaitinfo"):
        return

    parent = multiprocessing.parent_process().pid  # not getppid, which may be a fork server's

    def wait() -> None:
        if signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            end = time.monotonic() + SECONDS
            while (left := end - time.monotonic()) > 0:
                received = signal.sigtimedwait({signal.SIGTERM}, left)
                if received is not None and received.si_pid == parent:
                    break
        os._exit(0)  # as PyTorch's own handler

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=wait, daemon=True).start()
