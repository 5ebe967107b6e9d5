#!/usr/bin/env python3
"""Say what can be reached, and how the work stands for each task type."""

import argparse
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.table import Table

from station import cli, contract
from station.database import Connection, connect, connect_data_factory, project_ids
from station.errors import ExitCode, StationError
from station.label_studio import LabelStudio
from station.settings import Settings, load_settings
from station.standing import CONFLICT, DONE, OPEN, SKIPPED, WAITING, counts
from station.task_types import TASK_TYPES, TaskType

COLUMNS = (WAITING, OPEN, DONE, SKIPPED, CONFLICT)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = cli.parser(__doc__ or "")
    cli.add_task_type(options, required=False)
    return options


def main(options: argparse.Namespace) -> ExitCode:
    """Ask every service, then count; a service that fails does not keep the others from being told."""
    settings = load_settings(options.env_file)
    services: dict[str, str] = {}
    code = ExitCode.DONE
    checks: tuple[tuple[str, Callable[[Settings], str]], ...] = (
        ("Label Studio", ask_label_studio),
        ("Label Studio's database", ask_label_studio_db),
        ("data_factory", ask_data_factory),
    )
    for name, check in checks:
        try:
            services[name] = f"ok: {check(settings)}"
        except StationError as error:
            services[name] = f"FAIL: {error}"
            code = max(code, error.exit_code)
    wanted = [options.task_type] if options.task_type else list(TASK_TYPES.values())
    work: dict[str, dict[str, Any]] = {}
    if services["data_factory"].startswith("ok"):
        with connect_data_factory(settings, "status") as data_factory:
            projects = project_ids(data_factory, settings)
            for task_type in wanted:
                work[task_type.name] = {"project": projects.get(task_type.name), **standing_of(data_factory, task_type)}
    if options.json:
        cli.print_result(options, {"services": services, "task_types": work}, [])
    else:
        show(services, work)
    return code


def ask_label_studio(settings: Settings) -> str:
    """Version and account."""
    label_studio = LabelStudio(settings)
    return f"{label_studio.version()} at {label_studio.address}, as {label_studio.whoami()}"


def ask_label_studio_db(settings: Settings) -> str:
    """Whether the scripts can read what they need."""
    with connect(settings, "label_studio_dsn", "status") as connection:
        contract.check(connection)
    return f"as the scripts need it ({contract.VERSION})"


def ask_data_factory(settings: Settings) -> str:
    """How many samples there are."""
    with connect_data_factory(settings, "status") as connection:
        row = connection.execute("SELECT count(*) FROM samples WHERE removed_at IS NULL").fetchone()
    return f"{row[0] if row else 0} samples"


def standing_of(data_factory: Connection, task_type: TaskType) -> dict[str, Any]:
    """Samples by standing, unusable annotations, and when scripts last succeeded."""
    result: dict[str, Any] = dict.fromkeys(COLUMNS, 0)
    result.update(data_factory.execute(counts(task_type)).fetchall())
    row = data_factory.execute(
        """
        SELECT count(*) FROM submitted_annotations AS a INNER JOIN tasks AS t USING (task_key)
        WHERE t.task_type = %s AND a.status = 'invalid'
        """,
        [task_type.name],
    ).fetchone()
    result["invalid annotations"] = row[0] if row else 0
    for script in ("push", "pull", "export"):
        row = data_factory.execute(
            """
            SELECT finished_at FROM runs
            WHERE script = %s AND (task_type = %s OR task_type IS NULL) AND exit_code IN (0, 3, 4)
            ORDER BY started_at DESC
            LIMIT 1
            """,
            [script, task_type.name],
        ).fetchone()
        result[f"last {script}"] = row[0] if row else None
    return result


def show(services: dict[str, str], work: dict[str, dict[str, Any]]) -> None:
    """Print for people."""
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    for name, answer in services.items():
        style = "green" if answer.startswith("ok") else "red"
        console.print(f"{name}: ", end="")
        console.print(answer, style=style, markup=False)
    if not work:
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("task type")
    table.add_column("project", justify="right")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for script in ("push", "pull", "export"):
        table.add_column(f"last {script}")
    for name, entry in work.items():
        table.add_row(
            name,
            str(entry["project"] or "-"),
            *(str(entry[column]) for column in COLUMNS),
            *(ago(entry[f"last {script}"]) for script in ("push", "pull", "export")),
        )
    console.print(table)
    for name, entry in work.items():
        fixed = {"project", "invalid annotations", *COLUMNS}
        others = {key: value for key, value in entry.items() if key not in fixed and not key.startswith("last ")}
        if entry["invalid annotations"]:
            others["annotations that need mending in Label Studio"] = entry["invalid annotations"]
        if others:
            console.print(f"{name}: also {', '.join(f'{value} {key}' for key, value in others.items())}")


def ago(moment: datetime | None) -> str:
    """How long ago, for people."""
    if moment is None:
        return "never"
    seconds = int((datetime.now(UTC) - moment).total_seconds())
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length} {unit} ago"
    return f"{max(seconds, 0)} s ago"


if __name__ == "__main__":
    cli.run(parser(), main)
