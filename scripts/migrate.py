#!/usr/bin/env python3
"""Bring data_factory to the current schema, and let the scripts read Label Studio's tables."""

import argparse
from pathlib import Path
from urllib.parse import urlencode

import psycopg
import psycopg.conninfo
import yoyo

from station import cli, contract
from station.cli import log
from station.database import connect, exclusive
from station.errors import ExitCode, SettingError
from station.settings import Settings, load_settings

MIGRATIONS = Path(__file__).resolve().parent.parent / "sql" / "migrations"
READER = "label_studio_reader"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = cli.parser(
        "Apply the schema steps below sql/migrations to DATA_FACTORY_OWNER_DSN. With LABEL_STUDIO_OWNER_DSN, also "
        "grant label_studio_reader the columns of Label Studio that the scripts read. Running it again changes nothing."
    )
    cli.add_dry_run(options)
    options.add_argument("--rollback", type=cli.positive, metavar="N", help="take the last N steps back instead")
    return options


def main(options: argparse.Namespace) -> ExitCode:
    """Apply or roll back, then grant."""
    settings = load_settings(options.env_file)
    done = _migrate(settings, options)
    granted = False
    if settings.label_studio_owner_dsn and not options.rollback:
        granted = _grant(settings, dry_run=options.dry_run)
    verb = "rolled back" if options.rollback else "applied"
    cli.print_result(
        options,
        {"dry_run": options.dry_run, verb.replace(" ", "_"): done, "reader_granted": granted},
        [f"{'would be ' if options.dry_run else ''}{verb}: {', '.join(done) or 'nothing to do'}"]
        + ([f"{READER} may read Label Studio's contract columns"] if granted else []),
    )
    return ExitCode.DONE


def _migrate(settings: Settings, options: argparse.Namespace) -> list[str]:
    connection = connect(settings, "data_factory_owner_dsn", "migrate")
    if connection.execute("SELECT FROM pg_roles WHERE rolname = 'labelstation'").fetchone() is None:
        raise SettingError("DATA_FACTORY_OWNER_DSN: the cluster has no role labelstation: run sql/cluster.sql first")
    if connection.execute("SELECT has_schema_privilege('public', 'CREATE')").fetchone() != (True,):
        raise SettingError("DATA_FACTORY_OWNER_DSN: this role may not make tables: name the database's owner")
    with connection, exclusive(connection, "migrate"):
        backend = yoyo.get_backend(_yoyo_address(settings.require("data_factory_owner_dsn")))
        try:
            # yoyo's own lock is a row that outlives a killed process; ours does not, and it is held.
            backend.break_lock()
            migrations = yoyo.read_migrations(str(MIGRATIONS))
            if options.rollback:
                steps = list(backend.to_rollback(migrations))[: options.rollback]
            else:
                steps = list(backend.to_apply(migrations))
            for step in [] if options.dry_run else steps:
                log.info("%s %s", "taking back" if options.rollback else "applying", step.id)
                (backend.rollback_one if options.rollback else backend.apply_one)(step)
        finally:
            backend.connection.close()
    return [step.id for step in steps]


def _yoyo_address(dsn: str) -> str:
    """The DSN as a URL, the only form that yoyo takes; of its parts it decodes only the arguments fully."""
    parts = psycopg.conninfo.conninfo_to_dict(dsn)
    return f"postgresql+psycopg:///?{urlencode({name: value for name, value in parts.items() if value is not None})}"


def _grant(settings: Settings, *, dry_run: bool) -> bool:
    with connect(settings, "label_studio_owner_dsn", "migrate") as connection:
        if connection.execute("SELECT to_regclass('task_completion')").fetchone() == (None,):
            log.warning("Label Studio has not made its tables yet: run migrate again after its init")
            return False
        if dry_run:
            return False
        try:
            contract.grant_reader(connection, READER)
        except psycopg.errors.UndefinedColumn as error:
            raise SettingError(
                f"LABEL_STUDIO_OWNER_DSN: this Label Studio lacks what the scripts read: {error.diag.message_primary}"
            ) from None
    return True


if __name__ == "__main__":
    cli.run(parser(), main)
