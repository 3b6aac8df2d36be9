"""``expert-router schema``."""

import json

import click

from sim.fleet_file import fleet_file_schema


@click.command("schema")
def command() -> None:
    """Print the JSON Schema of fleet files, for editors that check YAML against one."""
    click.echo(json.dumps(fleet_file_schema(), indent=2))
