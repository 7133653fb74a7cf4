"""The most memory that a process has had at once."""

import resource
import subprocess
import sys
from pathlib import Path


def peak_megabytes() -> float:
    """Of this one. On Linux of this program alone: getrusage's number begins with that of the process it came from."""
    if sys.platform == "linux":
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def run_alone(script: str) -> None:
    """In a process of its own, which must succeed."""
    command, folder = [sys.executable, "-c", script], Path(__file__).parents[1]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
