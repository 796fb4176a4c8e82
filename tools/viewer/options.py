# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Options that the tools of the analysis share."""

from __future__ import annotations

import argparse


def add_layers(parser: argparse.ArgumentParser) -> None:
    """Adds --layers, a list of names; None where it is not given."""
    parser.add_argument(
        "--layers",
        type=lambda text: [name.strip() for name in text.split(",")] if text else None,
        metavar="NAME,NAME",
        help="deformable layers to follow; default: all",
    )
