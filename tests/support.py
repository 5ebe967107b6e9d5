"""What tests share."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def start_script(name: str, *arguments: str, env_file: Path) -> Iterator[subprocess.Popen[str]]:
    """Start one of the scripts and go on; it is killed at the end if it still runs."""
    running = subprocess.Popen(
        [sys.executable, str(PROJECT / "scripts" / f"{name}.py"), "--env-file", str(env_file), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=env_file.parent,
        env={"PATH": os.environ["PATH"]},
    )
    with running:
        try:
            yield running
        finally:
            running.kill()


def write_settings(file: Path, **settings: str) -> Path:
    file.write_text("".join(f"{name}='{value}'\n" for name, value in settings.items()))
    return file
