# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Which deformable layers feed which, seen while a network runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

Layers = frozenset[str]


class Flow(TorchDispatchMode):
    """Follows every tensor from op to op, and knows the layers that it was made with."""

    def __init__(self) -> None:
        """Begins with nothing known."""
        super().__init__()
        self.layers_of = WeakTensorKeyDictionary()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Runs an op, whose outputs are made with all layers that its inputs are."""
        out = func(*args, **(kwargs or {}))
        found: Layers = frozenset().union(*map(self.behind, tree_leaves((args, kwargs))))
        if found:
            for tensor in tree_leaves(out):
                self.mark(tensor, found)
        return out

    def behind(self, value: Any) -> Layers:
        """Returns the layers that a tensor was made with; none for what is no tensor."""
        return self.layers_of.get(value, frozenset()) if isinstance(value, Tensor) else frozenset()

    def mark(self, value: Any, layers: Layers) -> None:
        """Notes that a tensor was made with layers, too."""
        if isinstance(value, Tensor):
            self.layers_of[value] = self.behind(value) | layers
