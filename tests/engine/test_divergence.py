# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Training that diverges: what is reported, and what it can be resumed from."""

from __future__ import annotations

import logging
import os
import re
import warnings

import pytest
import torch

from detectron2.data import DatasetMapper
from detectron2.engine import HookBase, SimpleTrainer, TrainerBase

from dcn_plugin.engine import Checkpointer, DivergenceReport
from dcn_plugin.engine.divergence import scalars, without_traceback
from dcn_plugin.layers import DeformConv2dPack
from dcn_plugin.messages import UserError
from tests.test_train_net import run

STEPS = {"SOLVER.MAX_ITER": 6, "SOLVER.CHECKPOINT_PERIOD": 2, "DATASETS.TEST": "()"}


def break_image(monkeypatch: pytest.MonkeyPatch, number: int) -> list[dict]:
    """Fills an image with NaN, counted from the start; returns what the mapper has returned."""
    original, mapped = DatasetMapper.__call__, []

    def call(self: DatasetMapper, record: dict) -> dict:
        result = original(self, record)
        if len(mapped) == number:
            result["image"] = torch.full(result["image"].shape, torch.nan)
        mapped.append(result)
        return result

    monkeypatch.setattr(DatasetMapper, "__call__", call)
    return mapped


def test_a_diverged_run_is_reported_and_resumed(tiny_coco, tmp_path, monkeypatch, capsys) -> None:
    run(tiny_coco, tmp_path / "whole", **STEPS)
    output = tmp_path / "output"
    with monkeypatch.context() as patch:
        images = break_image(patch, 7)  # two per iteration
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            run(tiny_coco, output, **STEPS)
    assert caught.value.code == 1
    log = (output / "log.txt").read_text()
    for text in (capsys.readouterr().out, log):
        assert "Traceback" not in text
        block = text[text.index("Training diverged at iteration 3, in process 0 of 1") :]
        block = block[: block.index("CLIP_GRADIENTS")]
        assert re.search(r"learning rate: 0\.000\d+\n", block)
        assert "backbone.res5.0.conv2_offset: mean nan" in block
        for image in images[6:8]:
            assert f"{image['image_id']} {image['file_name']}" in block
        assert f"last checkpoint, for --resume: {output}/model_0000001.pth" in block
    run(tiny_coco, output, "--resume", **STEPS)
    whole, resumed = (
        torch.load(folder / "model_final.pth", weights_only=True)["model"]
        for folder in (tmp_path / "whole", output)
    )
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_weights_that_diverge_in_the_last_step_are_not_saved(
    tiny_coco, tmp_path, monkeypatch, capsys
) -> None:
    step = torch.optim.SGD.step

    def diverge(self: torch.optim.SGD, *arguments: object) -> None:
        step(self, *arguments)
        diverge.steps += 1
        if diverge.steps == STEPS["SOLVER.MAX_ITER"]:
            self.param_groups[-1]["params"][0].data.fill_(torch.nan)

    diverge.steps = 0
    monkeypatch.setattr(torch.optim.SGD, "step", diverge)
    with pytest.raises(SystemExit) as caught:
        run(tiny_coco, tmp_path, **STEPS)
    assert caught.value.code == 1
    printed = capsys.readouterr().out
    assert "model_0000005.pth is not saved" in printed and "Traceback" not in printed
    block = printed[printed.index("Training diverged at iteration 5, in process 0 of 1") :]
    block = block[block.index("model_0000005.pth is not saved") : block.index("CLIP_GRADIENTS")]
    assert re.search(r"learning rate: .*\n  offsets of this batch", block)
    assert re.search(r"images: \d+ .*, \d+ ", block)
    assert f"last checkpoint, for --resume: {tmp_path}/model_0000003.pth" in block
    assert "reports its own images" not in block
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000003.pth"
    assert not (tmp_path / "model_final.pth").exists()


def test_a_full_disk_ends_training_with_one_line(tiny_coco, tmp_path, monkeypatch, capsys) -> None:
    def fail(descriptor: int) -> None:  # from the first checkpoint on, also of metrics.json
        fail.full |= any(tmp_path.glob("model_0000001.pth.*.tmp"))
        if fail.full:
            raise OSError(28, "No space left on device")

    fail.full = False

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(SystemExit) as caught:
        run(tiny_coco, tmp_path, **STEPS)
    assert str(caught.value).startswith(f"train_net: {tmp_path}/model_0000001.pth cannot be")
    printed = capsys.readouterr().out
    assert "Traceback" not in printed
    (line,) = [line for line in printed.splitlines() if "No space left" in line]
    assert f"{tmp_path}/model_0000001.pth cannot be written" in line


class Toy(torch.nn.Sequential):
    calls = 0

    def forward(self, batch: list[dict]) -> dict[str, torch.Tensor]:
        self.calls += 1
        images = torch.stack([record["image"] for record in batch])
        return {"loss_a": super().forward(images).mean(), "loss_b": images.mean() * 0}


def toy(batches: list[list[dict]]) -> SimpleTrainer:
    model = Toy(*(DeformConv2dPack(2, 2, 3, padding=1) for _ in range(9)))
    return SimpleTrainer(model, batches, torch.optim.SGD(model.parameters(), 0.5))


def record(name: str, value: float) -> dict:
    return {"image_id": 7, "file_name": name, "image": torch.full((2, 6, 6), float(value))}


def test_a_stock_trainer_gets_the_report(caplog) -> None:
    batches = [[record("a.png", 1)], [record("b.png", 1), record("c.png", torch.inf)]]
    trainer = toy(batches)
    trainer.register_hooks([DivergenceReport()])
    with pytest.raises(FloatingPointError) as caught, caplog.at_level(logging.ERROR):
        trainer.train(0, 2)
    lines = str(caught.value).splitlines()
    assert lines[0] == "Training diverged at iteration 1, in process 0 of 1"
    assert lines[1].startswith("  losses: loss_a nan, loss_b nan")
    assert "  learning rate: 0.5" in lines and "  images: 7 b.png, 7 c.png" in lines
    assert len([line for line in lines if "mean nan" in line]) == 8
    assert "    and 1 layers with smaller ones" in lines


def test_offsets_of_layers_before_an_error_are_reported() -> None:
    trainer = toy([[record("a.png", torch.nan)]])

    def fail(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if trainer.model.calls == 2:  # the forward pass of the report
            raise ValueError("NaN")

    trainer.model[3].register_forward_pre_hook(fail)
    trainer.register_hooks([DivergenceReport()])
    with pytest.raises(FloatingPointError) as caught:
        trainer.train(0, 1)
    _, _, rows = str(caught.value).partition(
        "offsets of this batch in pixels (the forward pass failed with ValueError; layers before "
        "it):\n"
    )
    assert rows.count("mean nan") == 3


def test_nothing_is_left_after_training() -> None:
    trainer = toy([[record("a.png", 1)]])
    hook = DivergenceReport()
    trainer.register_hooks([hook])
    trainer.train(0, 1)
    assert "run_step" not in vars(trainer) and "_write_metrics" not in vars(trainer)
    assert "after_step" not in vars(trainer)
    assert not trainer.model._forward_pre_hooks and hook._call is None


def test_other_processes_report_their_own_losses(monkeypatch, capsys) -> None:
    # As in a process whose rank is not 0: Detectron2 raises in the main process alone.
    from detectron2.utils import comm

    monkeypatch.setattr(comm, "get_rank", lambda: 1)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(comm, "gather", lambda data: [])
    trainer = toy([[record("a.png", 1)], [record("b.png", torch.nan)]])
    trainer.register_hooks([DivergenceReport()])
    with pytest.raises(FloatingPointError):
        trainer.train(0, 2)
    printed = capsys.readouterr().err
    assert "Training diverged at iteration 1, in process 1 of 2" in printed
    assert "images: 7 b.png" in printed
    # Another forward pass could wait for processes whose losses are finite.
    assert trainer.model.calls == 2 and "offsets: not measured with several" in printed


class ByName(SimpleTrainer):
    """Calls the model by a keyword."""

    def run_step(self) -> None:
        self._write_metrics(self.model(batch=next(self._data_loader_iter)), 0.0)


def test_arguments_by_name_are_reported() -> None:
    model = toy([]).model
    trainer = ByName(model, [[record("a.png", torch.nan)]], torch.optim.SGD(model.parameters(), 1))
    trainer.register_hooks([DivergenceReport()])
    with pytest.raises(FloatingPointError) as caught:
        trainer.train(0, 1)
    lines = str(caught.value).splitlines()
    assert "  images: 7 a.png" in lines and len([x for x in lines if "mean nan" in x]) == 8


class Minimal(TrainerBase):
    """Has nothing but a model, which takes a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.model = torch.nn.Linear(1, 1)

    def run_step(self) -> None:
        if not self.model(torch.full((2, 1), torch.nan)).isfinite().all():
            raise FloatingPointError("the output\nis not finite")


def test_a_trainer_without_metrics_and_optimizer_gets_the_report() -> None:
    trainer = Minimal()
    trainer.register_hooks([DivergenceReport()])
    with pytest.raises(FloatingPointError) as caught:
        trainer.train(0, 1)
    lines = str(caught.value).splitlines()
    assert lines[1] == "  the output is not finite" and len(lines) == 3
    assert "run_step" not in vars(trainer)


def test_the_error_of_an_earlier_hook_stays() -> None:
    class Fails(HookBase):
        def before_train(self) -> None:
            raise ZeroDivisionError

    trainer = toy([[record("a.png", 1)]])
    trainer.register_hooks([Fails(), DivergenceReport()])
    with pytest.raises(ZeroDivisionError):
        trainer.train(0, 1)


def test_losses_that_need_gradients_or_are_no_scalars() -> None:
    loss = torch.tensor([0.5], requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert scalars({"a": loss, "b": torch.ones(2), "c": 2}) == {"a": 0.5, "c": 2}


def test_a_wrong_last_checkpoint_does_not_hide_the_report(tmp_path) -> None:
    (tmp_path / "last_checkpoint").write_text("/elsewhere/model_final.pth")
    trainer = toy([[record("a.png", torch.nan)]])
    trainer.checkpointer = Checkpointer(trainer.model, str(tmp_path))
    trainer.register_hooks([DivergenceReport()])
    with pytest.raises(FloatingPointError, match=r"for --resume: none, .*/elsewhere/"):
        trainer.train(0, 1)


def test_errors_that_follow_do_not_hide_the_expected_one() -> None:
    def chain(*errors: Exception) -> None:
        try:
            raise errors[0]
        finally:
            if errors[1:]:
                chain(*errors[1:])

    full = UserError("the disk is full")
    with pytest.raises(UserError, match="the disk is full"), without_traceback():
        chain(full, ValueError("closed"), OSError(28, "No space"), RuntimeError("writing failed"))
    assert full.__suppress_context__
    with pytest.raises(RuntimeError, match="writing failed"), without_traceback():
        chain(ValueError("a defect"), RuntimeError("writing failed"))
