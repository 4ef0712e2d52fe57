"""What scripts print that compile kernels: in processes of their own, since in one process kernels are either compiled
or interpreted."""

import json
import os
import subprocess
import sys
from pathlib import Path


def output_of(script: str, *arguments: str) -> str:
    """What a script beside this file prints, given arguments."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name(script), *arguments],
        # From Python 3.11 on nothing is imported from the script's folder.
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows_of(script: str, *arguments: str) -> list[dict]:
    """As `output_of`, of a script that prints JSON objects, one a line."""
    return [json.loads(line) for line in output_of(script, *arguments).splitlines()]
