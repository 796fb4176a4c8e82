# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""The calls that `make gpu-check` runs under compute-sanitizer."""

from __future__ import annotations

import pytest

from tests.cuda_emulator.traffic import traffic_of
from tests.devices import EMULATOR
from tests.ops import sanitizer_calls


def test_they_run_on_the_cpu(capsys):
    sanitizer_calls.main("cpu")
    names = capsys.readouterr().out.split("done: ")[1:]
    assert len(names) == len(set(names)) > 100
    assert {name.split("-")[0] for name in names} == {"conv", "roi"}


@pytest.mark.cuda
@pytest.mark.skipif(not EMULATOR, reason="the emulator knows which kernels were launched")
def test_they_reach_all_kernels():
    launched = traffic_of(EMULATOR, lambda: sanitizer_calls.main("cpu"))
    assert set(launched) == set(EMULATOR.kernels)
