# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""The networks under tracing, in DefaultPredictor and under DDP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from detectron2.engine import DefaultPredictor
from detectron2.export.flatten import TracingAdapter
from detectron2.export.torchscript_patch import patch_builtin_len
from detectron2.utils.events import EventStorage

from .networks import NETWORKS, build_network, inputs, network_config

networks = pytest.mark.parametrize("network", NETWORKS)


def image(seed: int, size: tuple[int, int] = (96, 128)) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8).float()


def detect(model: torch.nn.Module, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs a network without rescaling the results, as exported models do."""
    if not hasattr(model, "inference"):
        return model(batch)
    return [{"instances": model.inference(batch, do_postprocess=False)[0]}]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@networks
@torch.no_grad()
def test_traced_network_gives_the_same(network: str) -> None:
    model = build_network(network, deformable=True).eval()
    adapter = TracingAdapter(model, [{"image": image(0)}], detect)
    with patch_builtin_len():
        traced = torch.jit.trace(adapter, (image(0),), check_trace=False)
    for seed, size in ((0, (96, 128)), (1, (96, 128)), (2, (112, 160))):
        if network == "deeplab" and size != (96, 128):
            continue  # SemanticSegmentor's sizes are those of the traced image
        expected = detect(model, [{"image": image(seed, size)}])[0]
        (found,) = adapter.outputs_schema(traced(image(seed, size)))
        if network == "deeplab":
            torch.testing.assert_close(found["sem_seg"], expected["sem_seg"])
        else:
            found, expected = found["instances"], expected["instances"]
            torch.testing.assert_close(found.scores, expected.scores)
            torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor)


@networks
def test_runs_in_default_predictor(network: str, tmp_path: Path) -> None:
    cfg = network_config(network, deformable=True)
    model = build_network(network, deformable=True).eval()
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    cfg.DATASETS.TEST = ()
    cfg.INPUT.MIN_SIZE_TEST = 64
    result = DefaultPredictor(cfg)(image(0, (80, 100)).permute(1, 2, 0).byte().numpy())
    if network == "deeplab":
        assert result["sem_seg"].shape == (5, 80, 100)
    else:
        assert result["instances"].image_size == (80, 100) and len(result["instances"]) > 0


def two_steps(rank: int, network: str, folder: str) -> None:
    """Trains two steps in one of two processes; the image of the second has no objects."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(rank)
    model = DistributedDataParallel(build_network(network, deformable=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with EventStorage():
        for _ in range(2):  # DDP raises in the second if a parameter got no gradient in the first
            losses = model(inputs()[rank : rank + 1])
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
    torch.save([p.detach() for p in model.module.parameters()], f"{folder}/{rank}.pth")
    dist.barrier()


@pytest.mark.slow
@networks
def test_two_processes_keep_the_same_weights(network: str, tmp_path: Path) -> None:
    mp.spawn(two_steps, (network, str(tmp_path)), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
