# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""SIGTERM in every phase of training."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from detectron2.engine import SimpleTrainer, hooks

from dcn_plugin.engine import Checkpointer, StopOnSigterm


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


class Loss(nn.Linear):
    def forward(self, input: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": super().forward(input).square().mean()}


class Stock(SimpleTrainer):
    """A trainer whose batches and evaluations can do anything."""

    def __init__(
        self,
        folder: Path,
        at: dict[int, Callable[[], None]] | None = None,
        evaluate: Callable[[], None] = lambda: None,
        first: bool = False,
        **periodic: int,
    ) -> None:
        def batches():
            for iteration in range(self.start_iter, 100):
                (at or {}).get(iteration, lambda: None)()
                torch.manual_seed(iteration)
                yield torch.rand(3, 2)

        class Batches:
            def __iter__(self):
                yield from batches()

        torch.manual_seed(0)
        model = Loss(2, 2)
        super().__init__(model, Batches(), torch.optim.SGD(model.parameters(), 0.1, momentum=0.9))
        self.evaluated = []
        self.checkpointer = Checkpointer(model, str(folder), trainer=self)
        self.periodic = hooks.PeriodicCheckpointer(self.checkpointer, **{"period": 4, **periodic})

        def evaluation() -> None:
            self.evaluated.append(self.iter)
            evaluate()

        self.stop = StopOnSigterm()
        parts = [self.periodic, hooks.EvalHook(3, evaluation)]
        # Where it is in the list does not matter.
        self.register_hooks([self.stop, *parts[::-1]] if first else [*parts, self.stop])

    def resume(self, max_iter: int) -> None:
        self.checkpointer.resume_or_load("", resume=True)
        self.train(self.iter + 1, max_iter)

    def stopped(self, max_iter: int = 10) -> str:
        """Trains until SIGTERM stops it, and returns the last checkpoint."""
        previous = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(SystemExit) as caught:
                self.train(0, max_iter)
            assert caught.value.code == 143
        finally:
            signal.signal(signal.SIGTERM, previous)
        return Path(self.checkpointer.get_checkpoint_file()).name


def assert_resumes_exactly(folder: Path, whole: Path, max_iter: int = 10) -> None:
    Stock(whole).train(0, max_iter)
    Stock(folder).resume(max_iter)
    a, b = (torch.load(path / "model_final.pth", weights_only=True) for path in (folder, whole))
    assert all(torch.equal(a["model"][name], value) for name, value in b["model"].items())
    momenta = (x["trainer"]["optimizer"]["state"] for x in (a, b))
    for one, other in zip(*(m.values() for m in momenta), strict=True):
        assert torch.equal(one["momentum_buffer"], other["momentum_buffer"])


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("step", [0, 1, 3, 5])
def test_the_step_ends_and_is_saved(step, first, tmp_path) -> None:
    trainer = Stock(tmp_path / "a", {step: terminate}, first=first)
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    assert trainer.stopped() == f"model_{step:07d}.pth"
    assert trainer.evaluated == [2][: step > 2]  # none of the step that was interrupted
    assert_resumes_exactly(tmp_path / "a", tmp_path / "b")


def test_a_step_without_workers_does_not_count(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(StopOnSigterm, "SIGNAL_DELAY", 0.0)

    def lose_workers(sent: bool = True) -> None:
        if sent:
            terminate()
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Terminated.")

    trainer = Stock(tmp_path / "a", {5: lose_workers})
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    assert trainer.stopped() == "model_0000004.pth"
    assert_resumes_exactly(tmp_path / "a", tmp_path / "b")
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        Stock(tmp_path, {5: lambda: lose_workers(False)}).train(0, 10)


def test_the_main_process_saves_if_another_one_has_ended(tmp_path) -> None:
    trainer = Stock(tmp_path)

    def agree() -> bool:
        if trainer.iter == 6:
            raise RuntimeError("Connection closed by peer")
        return False

    trainer.stop._agree_to_stop = agree
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        trainer.train(0, 10)
    assert trainer.checkpointer.get_checkpoint_file() == str(tmp_path / "model_0000005.pth")


def test_a_signal_in_the_last_step_skips_the_evaluation(tmp_path) -> None:
    trainer = Stock(tmp_path, {9: terminate})
    assert trainer.stopped() == "model_final.pth"
    assert trainer.evaluated == [2, 5, 8]


def train_in_two_processes(folder: Path, rank: int, port: int) -> None:
    store = dist.TCPStore("127.0.0.1", port)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    trainer = Stock(folder, {7: terminate} if rank == 0 else {})
    if rank > 0:
        trainer._hooks.remove(trainer.periodic)
    try:
        trainer.train(0, 9)
    finally:
        (folder / f"evaluated{rank}").write_text(str(trainer.evaluated))


def test_all_processes_stop_before_the_last_step_without_evaluation(tmp_path) -> None:
    spawn = multiprocessing.get_context("spawn")
    # Not a file, which the first process to end may remove while the other one opens it.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = [
        spawn.Process(target=train_in_two_processes, args=(tmp_path, rank, store.port))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [143, 143]
    assert [(tmp_path / f"evaluated{rank}").read_text() for rank in range(2)] == ["[2, 5]"] * 2
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000007.pth"


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("at", [2, 10])
def test_an_evaluation_is_interrupted(at, first, tmp_path) -> None:
    def evaluate() -> None:
        if trainer.iter == at:
            terminate()
            time.sleep(60)

    trainer = Stock(tmp_path / "a", evaluate=evaluate, first=first)
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    start = time.monotonic()
    assert trainer.stopped() == ("model_0000002.pth" if at == 2 else "model_final.pth")
    assert time.monotonic() - start < 20
    if at == 2:
        assert_resumes_exactly(tmp_path / "a", tmp_path / "b")


def test_more_signals_change_nothing(tmp_path, monkeypatch) -> None:
    trainer = Stock(tmp_path, {5: lambda: [terminate() for _ in range(3)]})
    save = torch.save

    def interrupted(*arguments: object) -> None:
        terminate()
        save(*arguments)

    monkeypatch.setattr(torch, "save", interrupted)  # from the first checkpoint on
    assert trainer.stopped() == "model_0000003.pth"  # whole, and the run ends after it
    assert len(list(tmp_path.glob("*.pth"))) == 1
    assert trainer.checkpointer.load(str(tmp_path / "model_0000003.pth"))["iteration"] == 3


def test_a_number_of_checkpoints_is_kept(tmp_path) -> None:
    trainer = Stock(tmp_path, {5: terminate}, period=2, max_to_keep=2)
    assert trainer.stopped() == "model_0000005.pth"
    assert {path.name for path in tmp_path.glob("*.pth")} == {
        "model_0000003.pth",
        "model_0000005.pth",
    }


def test_nothing_is_saved_before_the_first_step(tmp_path) -> None:
    trainer = Stock(tmp_path)
    before_train = trainer.before_train

    def signalled() -> None:
        before_train()
        terminate()

    trainer.before_train = signalled
    assert trainer.stopped() == "" and not list(tmp_path.iterdir())


def test_the_handler_is_restored(tmp_path) -> None:
    def handler(*arguments: object) -> None:
        pass

    previous = signal.signal(signal.SIGTERM, handler)
    try:
        trainer = Stock(tmp_path)
        trainer.train(0, 4)
        assert signal.getsignal(signal.SIGTERM) is handler and "after_train" not in vars(trainer)
        trainer.periodic.after_train = lambda: 1 / 0
        with pytest.raises(ZeroDivisionError):
            trainer.train(4, 8)
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_other_threads_install_no_handler(tmp_path) -> None:
    previous = signal.getsignal(signal.SIGTERM)
    found = []

    def check() -> None:
        found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=lambda: Stock(tmp_path, {2: check}).train(0, 4))
    thread.start()
    thread.join()
    assert found == [previous] and (tmp_path / "model_final.pth").exists()


def test_errors_of_evaluation_stay_errors(tmp_path) -> None:
    def evaluate() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Stock(tmp_path, evaluate=evaluate).train(0, 10)
