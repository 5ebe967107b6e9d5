#!/usr/bin/env python3
"""Write manifest.jsonl and manifest.json: what lies in a folder of reviewed data."""

import argparse
import hashlib
from collections.abc import Iterator
from pathlib import Path

from station import cli
from station.database import Connection, connect_data_factory, exclusive, recorded_run
from station.errors import ExitCode, SettingError, UsageError
from station.files import json_document, replace_file, writing_to
from station.settings import Settings, load_settings
from station.task_types import TASK_TYPES

SCHEMA_VERSION = 1
_LINES_AT_ONCE = 1000


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = cli.parser(
        "Write manifest.jsonl (one line for each exported folder) and manifest.json (totals, and the sha256 of\n"
        "manifest.jsonl) into a folder that export.py filled. Files that would not change are left alone."
    )
    add_output_dir(options)
    return options


def add_output_dir(options: argparse.ArgumentParser) -> None:
    """Add `--output-dir`."""
    options.add_argument(
        "--output-dir", type=Path, metavar="DIR", help="folder of reviewed data (default: REVIEWED_DIR)"
    )


def output_folder(options: argparse.Namespace, settings: Settings) -> Path:
    """Where reviewed data goes, as the absolute path that `exports.destination` holds.

    Raises:
        UsageError: the path is not UTF-8, or lies within the raw data.
    """
    output = Path(options.output_dir or settings.reviewed_dir).resolve()
    if not str(output).isprintable():
        raise UsageError(f"the name of the output folder is not readable text: {str(output)!r}")
    if output.is_relative_to(settings.raw_dir.resolve()):
        raise UsageError(f"reviewed data may not lie within the raw data: {output} is within RAW_DIR")
    return output


def main(options: argparse.Namespace) -> ExitCode:
    """Write both files."""
    settings = load_settings(options.env_file)
    output = output_folder(options, settings)
    with (
        connect_data_factory(settings, "manifest") as connection,
        exclusive(connection, f"export to {output}"),
        recorded_run(connection, "manifest") as run,
    ):
        if not output.is_dir():
            raise SettingError(
                f"there is no folder {output}: run `make export` first, or name another with --output-dir"
            )
        changed = write_manifest(connection, output)
        run.counts["changed"] = changed
    cli.print_result(
        options,
        {"destination": str(output), "changed": changed},
        [f"manifest: {'written' if changed else 'unchanged'}", f"in: {output}"],
    )
    return ExitCode.DONE


def write_manifest(connection: Connection, output: Path) -> bool:
    """Write both files from what `exports` records; the caller holds the lock on exports to this folder.

    manifest.json comes second: a reader who finds that its sha256 is not that of manifest.jsonl is between the two.

    Returns:
        whether a file changed.
    """
    digest = hashlib.sha256()
    size_bytes = 0

    def counted(lines: Iterator[bytes]) -> Iterator[bytes]:
        nonlocal size_bytes
        for line in lines:
            digest.update(line)
            size_bytes += len(line)
            yield line

    with writing_to(output):
        with connection.transaction():
            # Lines and totals must be of the same moment.
            connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
            changed = replace_file(output / "manifest.jsonl", counted(_lines(connection, output)))
            totals = _totals(connection, output)
        summary = {
            "schema_version": SCHEMA_VERSION,
            **totals,
            "manifest": {"file": "manifest.jsonl", "size_bytes": size_bytes, "sha256": digest.hexdigest()},
        }
        return replace_file(output / "manifest.json", [json_document(summary)]) or changed


def _lines(connection: Connection, output: Path) -> Iterator[bytes]:
    with connection.cursor("manifest_lines") as cursor:
        cursor.itersize = _LINES_AT_ONCE
        cursor.execute(
            """
            SELECT e.entry::text
            FROM exports AS e
            INNER JOIN samples AS s USING (sample_id)
            WHERE e.destination = %s
            ORDER BY e.task_type, s.external_id COLLATE "C"
            """,
            [str(output)],
        )
        for (line,) in cursor:
            yield f"{line}\n".encode()


def _totals(connection: Connection, output: Path) -> dict[str, object]:
    """Counts and durations; a sample that was reviewed in several ways counts once in the sum."""
    rows = connection.execute(
        """
        WITH written AS MATERIALIZED (
            -- As numeric: the sum of binary fractions would depend on their order.
            SELECT task_type::text, sample_id, coalesce((entry ->> 'duration_seconds')::numeric, 0) AS seconds
            FROM exports
            WHERE destination = %s
        )
        SELECT NULL, count(*), coalesce(sum(seconds), 0)::float8
        FROM (SELECT max(seconds) AS seconds FROM written GROUP BY sample_id) AS by_sample
        UNION ALL
        SELECT task_type, count(*), sum(seconds)::float8 FROM written GROUP BY task_type
        """,
        [str(output)],
    ).fetchall()
    totals = {name: (count, seconds) for name, count, seconds in rows}
    return {
        "samples": totals[None][0],
        "duration_seconds": totals[None][1],
        "task_types": {
            task_type.name: {
                "folder": task_type.folder,
                "samples": totals.get(task_type.name, (0, 0.0))[0],
                "duration_seconds": totals.get(task_type.name, (0, 0.0))[1],
            }
            for task_type in TASK_TYPES.values()
        },
    }


if __name__ == "__main__":
    cli.run(parser(), main)
