"""What tests share."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psycopg

from station.local_services import PROJECT

Connection = psycopg.Connection[tuple[Any, ...]]


def run_script(name: str, *arguments: str, env_file: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run one of the scripts as its own process, as everyone does."""
    return subprocess.run(
        [sys.executable, str(PROJECT / "scripts" / f"{name}.py"), "--env-file", str(env_file), *arguments],
        capture_output=True,
        text=True,
        cwd=env_file.parent,
        env={"PATH": os.environ["PATH"], **environment},
        check=False,
        timeout=240,
    )


def write_settings(file: Path, **settings: str) -> Path:
    file.write_text("".join(f"{name}='{value}'\n" for name, value in settings.items()))
    return file
