# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Reads checkpoints that pickle objects of other projects beside their weights.

MMEngine's hold a history and a message hub, for example, and `torch.load` refuses such files. Its
restricted unpickler (`weights_only=True`) reads them here with a placeholder for each class or
function that it does not know, so that none of them is imported or called.
"""

from __future__ import annotations

from typing import Any

import torch


class Placeholder:
    """Stands for an object of a class that is not imported; keeps nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Ignores the arguments."""

    def __setstate__(self, state: Any) -> None:
        """Ignores the state."""


def load_inert(path: str) -> Any:
    """Loads a file of `torch.save` onto the CPU, with placeholders for what it may not import.

    Args:
        path: a local file, in the zip format (PyTorch 1.6 and later).

    Raises:
        ValueError: if it is in the older format.
        pickle.UnpicklingError: if it names functions of the operating system, or is damaged.
    """
    placeholders = []
    for name in torch.serialization.get_unsafe_globals_in_checkpoint(path):
        module, _, short = name.rpartition(".")
        placeholders.append((type(short, (Placeholder,), {"__module__": module}), name))
    with torch.serialization.safe_globals(placeholders):
        return torch.load(path, map_location="cpu", weights_only=True)
