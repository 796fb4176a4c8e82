# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Counts the memory traffic of the CUDA kernels on layers that people run, in the emulator.

`python -m tests.cuda_emulator.traffic` prints Markdown: bytes that the kernels request, bytes that
they access at least once per launch, and what both allow on an H100 at best. These are counts and
bounds, not measurements of a GPU. Needs the build `checked` (`make emulator`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dcn_plugin.ops import deform_conv2d, deform_ps_roi_pool, deform_roi_pool
from tests.cuda_emulator.library import ROOT, Emulator, Traffic

# Published peaks of the H100 SXM: HBM3 in bytes/s, float32 in FLOP/s without tensor cores, and
# TF32 with them, without sparsity.
HBM, FLOAT32, TF32 = 3.35e12, 67e12, 494e12
SIZES = ("read", "written", "added")


@dataclass(frozen=True)
class Layer:
    """A convolution in float32, channels-last: both passes."""

    channels: int
    size: tuple[int, int]
    outputs: int
    kernel: int = 3
    dilation: int = 1
    offset_groups: int = 1
    mask: bool = False

    def run(self) -> None:
        padding, taps = self.dilation * (self.kernel // 2), self.offset_groups * self.kernel**2
        input = torch.randn(1, self.channels, *self.size).contiguous(
            memory_format=torch.channels_last
        )
        leaves = {
            "input": input,
            "offset": torch.randn(1, 2 * taps, *self.size),
            "weight": torch.randn(self.outputs, self.channels, self.kernel, self.kernel),
            "mask": torch.rand(1, taps, *self.size) if self.mask else None,
        }
        wanted = [leaf.requires_grad_() for leaf in leaves.values() if leaf is not None]
        output = deform_conv2d(**leaves, padding=padding, dilation=self.dilation)
        torch.autograd.grad(output, wanted, torch.ones_like(output))

    @property
    def gemm_flops(self) -> int:
        return 2 * self.size[0] * self.size[1] * self.outputs * self.channels * self.kernel**2

    @property
    def plain_bytes(self) -> int:
        """What the plain convolution must read and write: input, weight and output."""
        positions = self.size[0] * self.size[1]
        weight = self.outputs * self.channels * self.kernel**2
        return 4 * (positions * (self.channels + self.outputs) + weight)


LAYERS = {
    "res5: 512 x 38 x 63 → 512, 3 x 3, dilation 2": Layer(512, (38, 63), 512, dilation=2),
    "res3: 128 x 100 x 168 → 128, 3 x 3, mask": Layer(128, (100, 168), 128, mask=True),
    "BasicVSR++: 64 x 64 x 64 → 64, 3 x 3, 16 offset groups, mask": Layer(
        64, (64, 64), 64, offset_groups=16, mask=True
    ),
}


def boxes(count: int) -> torch.Tensor:
    """Returns boxes of all sizes on an image of 608 x 1008 pixels."""
    corner = torch.rand(count, 2) * torch.tensor([800.0, 450.0])
    size = 16 * 2 ** (5 * torch.rand(count, 2))
    return torch.cat([torch.zeros(count, 1), corner, corner + size], dim=1)


def pool(channels: int, groups: int, function: Callable[..., torch.Tensor]) -> None:
    """Runs both passes of RoI pooling of 300 RoIs, 7 x 7 bins, in float32."""
    input = torch.randn(1, channels * groups, 38, 63).contiguous(memory_format=torch.channels_last)
    offset = torch.randn(300, 2, 7, 7).requires_grad_()
    output = function(input.requires_grad_(), boxes(300), offset, 7, 1 / 16)
    torch.autograd.grad(output, [input, offset], torch.ones_like(output))


POOLS = {
    "deformable RoI pooling: 256 x 38 x 63, 300 RoIs, 7 x 7": lambda: pool(256, 1, deform_roi_pool),
    "position-sensitive: 21 x 49 x 38 x 63, 300 RoIs, 7 x 7": lambda: pool(
        21, 49, deform_ps_roi_pool
    ),
}


def traffic_of(emulator: Emulator, call: Callable[[], None]) -> dict[str, Traffic]:
    """Returns the traffic of one call by kernel."""
    before = emulator.traffic()
    call()
    none = Traffic(0, (0, 0, 0), (0, 0, 0))
    found = {}
    for name, after in emulator.traffic().items():
        old = before.get(name, none)
        if after.launches > old.launches:
            found[name] = Traffic(
                after.launches - old.launches,
                tuple(a - b for a, b in zip(after.requested, old.requested, strict=True)),
                tuple(a - b for a, b in zip(after.unique, old.unique, strict=True)),
            )
    return found


def megabytes(sizes: tuple[int, int, int]) -> str:
    """Formats the bytes read, written and added."""
    return " / ".join(f"{size / 1e6:.1f}" if size else "0" for size in sizes)


def main() -> None:
    emulator = Emulator(ROOT / "build" / "cuda_emulator" / "checked" / "emulator.so")
    torch.manual_seed(0)
    print(f"MB {' / '.join(SIZES)}; µs: unique bytes at {HBM / 1e12} TB/s\n")
    print("| kernel | launches | requested, MB | unique, MB | µs |\n|---|---|---|---|---|")
    for title, call in {**{k: v.run for k, v in LAYERS.items()}, **POOLS}.items():
        print(f"| **{title}** | | | | |")
        for name, t in traffic_of(emulator, call).items():
            # An addition reads and writes.
            seconds = (sum(t.unique) + t.unique[2]) / HBM
            requested, unique = megabytes(t.requested), megabytes(t.unique)
            print(f"| `{name}` | {t.launches} | {requested} | {unique} | {seconds * 1e6:.1f} |")
    print("\n| GEMMs | GFLOP forward | µs in float32 | µs in TF32 | plain convolution, MB | µs |")
    print("|---|---|---|---|---|---|")
    for title, layer in LAYERS.items():
        flops, size = layer.gemm_flops, layer.plain_bytes
        times = f"{flops / FLOAT32 * 1e6:.0f} | {flops / TF32 * 1e6:.0f}"
        print(
            f"| {title} | {flops / 1e9:.1f} | {times} | {size / 1e6:.1f} | {size / HBM * 1e6:.1f} |"
        )


if __name__ == "__main__":
    main()
