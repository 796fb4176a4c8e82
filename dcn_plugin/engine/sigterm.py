# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""SIGTERM, as schedulers send it before they kill a job: a checkpoint, and exit code 143."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from detectron2.engine import HookBase
from detectron2.engine.hooks import EvalHook, PeriodicCheckpointer
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm

EXIT_CODE = 128 + signal.SIGTERM
Handler = Callable[[int, FrameType | None], Any] | int | None


def set_handler(handler: Handler) -> Handler:
    """Sets the handler of SIGTERM if this is the main thread, and returns the earlier one.

    Args:
        handler: None, which stands for one that was not installed from Python, changes nothing.
    """
    if handler is not None and threading.current_thread() is threading.main_thread():
        return signal.signal(signal.SIGTERM, handler)
    return handler


def exit_on_sigterm(number: int, frame: FrameType | None) -> None:
    """A handler that exits with code 143, as a shell reports it, and cleans up before."""
    set_handler(signal.SIG_IGN)
    raise SystemExit(EXIT_CODE)


@contextmanager
def exit_after_sigterm() -> Iterator[None]:
    """Exits with code 143 after SIGTERM, also if what it has interrupted raises another error."""
    set_handler(exit_on_sigterm)
    try:
        yield
    except BaseException:
        # A library that cleans up on the way out may fail on what was left half done.
        if signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:  # by `exit_on_sigterm`
            raise SystemExit(EXIT_CODE) from None
        raise


class StopOnSigterm(HookBase):
    """Saves a checkpoint and exits with code 143 at the next step boundary after SIGTERM.

    All processes stop at the same step, whichever of them get the signal: they agree by a
    collective on the CPU before each step. A step whose DataLoader the signal has ended does not
    count. An evaluation is interrupted, and none runs after the signal; during it, each process
    stops once it gets the signal itself. If another process has ended, the main one saves before it
    raises the error of the collective. The checkpoint is named and counted as one of the trainer's
    `PeriodicCheckpointer`. Further signals are ignored. With `ExactResume`, a resumed run gets the
    same weights as one without interruption.
    """

    GRACE = 20.0  # seconds for the main process to save, where another waits in a collective
    SIGNAL_DELAY = 2.0  # seconds between the signals to workers and to their parent

    def before_train(self) -> None:
        self._stopping = self._evaluating = False
        # Not the backend of training: NCCL would wait for the GPU.
        self._group = None
        if comm.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo", timeout=DEFAULT_TIMEOUT)
        hooks = self.trainer._hooks
        self._evaluations = [hook for hook in hooks if isinstance(hook, EvalHook)]
        for hook in self._evaluations:
            earlier = hooks[: hooks.index(hook)]
            saved = any(isinstance(other, PeriodicCheckpointer) for other in earlier)
            hook._do_eval = self._interruptible(hook._do_eval, saved)
        self._previous = set_handler(self._receive)
        self._step = self.trainer.run_step
        self.trainer.run_step = self._run_step
        self.trainer.after_train = self._after_train

    def before_step(self) -> None:
        try:
            stop = self._agree_to_stop()
        except RuntimeError:  # another process has ended, such as in an evaluation
            self._save(self.trainer.iter - 1, saved=True, cause="an error in another process")
            raise
        if stop:
            self._stopping = True  # also in a process that did not get the signal itself
            self._stop(self.trainer.iter - 1, saved=True, agreed=True)

    def _run_step(self) -> None:
        try:
            self._step()
        except RuntimeError as error:
            if f"signal: {signal.strsignal(signal.SIGTERM)}" in str(error):  # of a worker
                time.sleep(self.SIGNAL_DELAY)
            if not self._stopping:
                raise
            # Without workers, the step has not changed the weights.
            self._stop(self.trainer.iter - 1, saved=True, agreed=False)

    def _after_train(self) -> None:
        # Around the hooks, of which one may evaluate, or raise.
        for name in ("run_step", "after_train"):
            vars(self.trainer).pop(name, None)  # the method of its class
        try:
            self.trainer.after_train()
        finally:
            if not self._stopping:
                set_handler(self._previous)
            for hook in self._evaluations:
                del hook._do_eval
        if self._stopping and self.trainer.iter == self.trainer.max_iter:  # in the last step
            raise SystemExit(EXIT_CODE)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True
        if self._evaluating:
            self._evaluating = False
            raise SystemExit(EXIT_CODE)

    def _agree_to_stop(self) -> bool:
        if self._group is None:
            return self._stopping
        received = torch.tensor([self._stopping], dtype=torch.uint8)
        try:
            dist.all_reduce(received, dist.ReduceOp.MAX, group=self._group)
        except RuntimeError:  # a process has stopped in an evaluation
            if not self._stopping:
                raise
            return True
        return bool(received)

    def _interruptible(self, evaluate: Callable[[], None], saved: bool) -> Callable[[], None]:
        def run() -> None:
            try:
                self._evaluating = True
                if self._stopping:
                    raise SystemExit(EXIT_CODE)
                evaluate()
                self._evaluating = False
            except BaseException as error:
                self._evaluating = False
                saved_now = saved or self.trainer.iter >= self.trainer.max_iter
                if not self._stopping:
                    if self._group is not None and isinstance(error, RuntimeError):
                        # Perhaps of a collective, since another process has ended.
                        self._save(self.trainer.iter, saved_now, cause="an error")
                    raise
                self._stop(self.trainer.iter, saved_now, agreed=False)

        return run

    def _stop(self, iteration: int, saved: bool, agreed: bool) -> None:
        """Saves in the main process, and exits.

        Args:
            iteration: the last one that is complete.
            saved: whether the `PeriodicCheckpointer` has seen it.
            agreed: whether all processes call this.
        """
        self._save(iteration, saved)
        try:
            if agreed and self._group is not None:
                dist.barrier(self._group)  # until the main process has saved
            elif not comm.is_main_process():
                timer = threading.Timer(self.GRACE, os._exit, [EXIT_CODE])
                timer.daemon = True
                timer.start()
                comm.synchronize()  # where the main process may wait for this one
        except RuntimeError:  # other processes have ended
            pass
        raise SystemExit(EXIT_CODE)

    def _save(self, iteration: int, saved: bool, cause: str = "SIGTERM") -> None:
        """Sets the iteration, and saves in the main process; the arguments are those of `_stop`."""
        self.trainer.iter = iteration  # before the last one, EvalHook.after_train does nothing
        if not comm.is_main_process():
            return
        log = logging.getLogger(__name__)
        if iteration < self.trainer.start_iter:
            log.warning("Stopped by %s before the first iteration", cause)
            return
        periodic = [hook for hook in self.trainer._hooks if isinstance(hook, PeriodicCheckpointer)]
        if not periodic:
            log.warning("Stopped by %s: the trainer has no PeriodicCheckpointer to save by", cause)
        for hook in periodic:
            last = iteration + 1 >= self.trainer.max_iter
            if not (saved and (last or (iteration + 1) % hook.period == 0)):
                hook.period, hook.max_iter = 1, None
                hook.step(iteration)
            file = hook.checkpointer.get_checkpoint_file()
            log.warning("Stopped by %s after iteration %d: %s", cause, iteration, file)
