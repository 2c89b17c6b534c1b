"""What makes a benchmark's figures worth keeping: where, on what and with which code they came."""

import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Python's and the packages', of the calling process's environment."""
    found = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version(), **found}


def peak_rss_bytes() -> int:
    """Most memory that this process had resident."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def write(name: str, command: str, result: dict[str, Any]) -> Path:
    """Write benchmarks/results/NAME.json: the result after when, where and on which commit."""
    file = ROOT / "benchmarks" / "results" / f"{name}.json"
    file.parent.mkdir(exist_ok=True)
    about = {
        "command": command,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": _commit(),
        "machine": _machine(),
    }
    file.write_text(json.dumps(about | result, indent=2) + "\n", encoding="utf-8")
    return file


def _commit() -> str:
    """The commit's hash; "+changes" where tracked files differ from it."""
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    if commit.returncode:
        return "unknown"
    dirty = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", ":!benchmarks/results"])
    return commit.stdout.strip() + ("+changes" if dirty.returncode else "")


def _machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), cpu)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": cpu, "cores": cores, "system": platform.platform(terse=True)}
