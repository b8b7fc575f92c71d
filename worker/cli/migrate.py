"""interview-access migrate."""

from __future__ import annotations

import click

from storage.errors import StorageError
from storage.schema import migrate as migrate_schema
from worker.cli.environment import read_settings
from worker.cli.terminal import FAILED, end
from worker.settings import DatabaseSettings


@click.command()
@click.option("--dry-run", is_flag=True, help="Change nothing; report what would be done.")
def migrate(*, dry_run: bool) -> None:
    """Migrate the database's tables to the newest revision, also while they are in use.

    Creates missing tables, and adopts those of the platform's Django service. Removes duplicate
    grants, except the one with the lowest ID: run --dry-run first, which reports their number.
    """
    settings = read_settings(DatabaseSettings)
    try:
        migrate_schema(settings.database_url, dry_run=dry_run, report=click.echo)
    except StorageError as error:
        end(FAILED, str(error))
