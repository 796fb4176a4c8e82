# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Random numbers that depend on the iteration and the image, and on nothing else."""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def image_seed(seed: int, iteration: int, record: dict[str, Any]) -> int:
    """Returns the seed of one image at one iteration.

    Args:
        seed: of the training.
        iteration: at which the image is learnt from.
        record: of the image, with `image_id` or `file_name`.

    Returns:
        a number below 2**32.
    """
    own = "image_id" in record
    name = str(record["image_id"]) if own else os.path.basename(record["file_name"])
    words = np.random.SeedSequence([seed, iteration, zlib.crc32(name.encode())])
    return int(words.generate_state(1)[0])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds Python, NumPy and PyTorch's CPU, and puts them back where they were."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
