# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""What a run leaves in OUTPUT_DIR beside Detectron2's config.yaml, log.txt and metrics.json."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info

from dcn_plugin.files import whole_file

ENVIRONMENT, RESULTS = "environment.txt", "results.json"


def describe_run(cfg: CfgNode) -> None:
    """Writes the command line, the git revision and the environment to OUTPUT_DIR.

    Args:
        cfg: of the run.
    """
    if not comm.is_main_process():
        return
    lines = [
        f"command: {shlex.join(sys.argv)}",
        f"processes: {comm.get_world_size()}",
        f"revision: {git_revision()}",
        "",
        collect_env_info(),
    ]
    (Path(cfg.OUTPUT_DIR) / ENVIRONMENT).write_text("\n".join(lines) + "\n")


def git_revision() -> str:
    """Returns the commit of this project, and whether files differ from it."""
    root = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != root:
            return "not in a git repository of its own"
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + (", with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "not in a git repository"


def write_results(cfg: CfgNode, results: dict[str, Any]) -> None:
    """Writes what an evaluation found to OUTPUT_DIR, in the main process.

    Args:
        cfg: of the run.
        results: by task, or by data set and task.
    """
    if not comm.is_main_process():
        return
    with whole_file(Path(cfg.OUTPUT_DIR) / RESULTS) as half:
        half.write_text(json.dumps(results, indent=2, default=float) + "\n")
