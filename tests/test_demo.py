"""The demo as somebody meets it who runs it twice, closes the terminal, or has its ports in use."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from station.local_services import PROJECT, answers, free_port
from support import eventually


@dataclass
class Demo:
    """A demo in a folder of its own, on ports of its own."""

    folder: Path
    label_studio_port: int
    audio_port: int

    @property
    def _environment(self) -> dict[str, str]:
        return {**os.environ, "LABELSTATION_DEMO_FOLDER": str(self.folder)}

    def command(self, *arguments: str) -> list[str]:
        ports = ["--label-studio-port", str(self.label_studio_port), "--audio-port", str(self.audio_port)]
        return [sys.executable, str(PROJECT / "scripts" / "demo.py"), *ports, *arguments]

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments), env=self._environment, capture_output=True, text=True, timeout=240, check=False
        )

    def launch(self) -> subprocess.Popen[str]:
        """Start it and wait until it stays up."""
        output = (self.folder.parent / "output").open("w+")
        child = subprocess.Popen(self.command(), env=self._environment, stdout=output, stderr=output, text=True)

        def up_or_dead() -> bool:
            printed = (self.folder.parent / "output").read_text()
            assert child.poll() is None, printed
            return "stays up until Ctrl-C" in printed

        eventually(up_or_dead, "the demo", 240)
        output.close()
        return child

    def serves(self) -> list[bool]:
        """Whether Label Studio and the audio server answer."""
        return [answers(f"http://localhost:{port}/health") for port in (self.label_studio_port, self.audio_port)]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    demo = Demo(tmp_path_factory.mktemp("demo") / "demo", free_port(), free_port())
    yield demo
    demo.run("--stop")


def test_it_adds_up_stops_on_ctrl_c_and_goes_on_where_it_ended(demo: Demo) -> None:
    child = demo.launch()
    assert demo.serves() == [True, True]
    second = demo.run("--once")
    assert (second.returncode, second.stderr.strip()) == (
        75,
        "error: a demo of this folder is already running: open its address, or `make demo-stop` first",
    )
    child.send_signal(signal.SIGINT)
    assert child.wait(60) == 0
    assert demo.serves() == [False, False]
    again = demo.run("--once")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "All numbers add up" in again.stdout
    assert "unchanged 33" in again.stdout
    assert demo.serves() == [False, False]


def test_what_a_killed_demo_left_behind_can_be_stopped(demo: Demo) -> None:
    child = demo.launch()
    child.kill()
    child.wait()
    assert demo.serves() == [True, True]
    stopped = demo.run("--stop")
    assert (stopped.returncode, stopped.stdout.strip()) == (0, "stopped")
    assert demo.serves() == [False, False]
    assert demo.run("--stop").stdout.strip() == "no demo is running"


def test_a_port_in_use_is_named_and_nothing_stays_behind(demo: Demo) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = demo.run("--once", "--audio-port", str(port))
    assert done.returncode == 78
    assert f"port {port} is taken by another program" in done.stderr
    assert demo.serves() == [False, False]
    # The port that was refused is not the one to use from now on.
    assert json.loads((demo.folder / "ports.json").read_text())[1] == demo.audio_port
