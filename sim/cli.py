"""The command ``expert-router``. Each sub-command lives in a module of its own, imported when it is called."""

from importlib import import_module
from typing import Any

import click

COMMANDS = {
    "simulate": ("sim.simulate_command", "predict fleets from 1 to thousands of users"),
    "run": ("real.users.run_command", "measure fleets with real users, as simulate predicts them"),
    "calibrate": ("calibrate.calibrate_command", "measure engines, fit profiles, and tell how wrong predictions are"),
    "serve": (
        "real.serving.serve_command",
        "run a fleet for real: vLLM experts and the gateway, OpenAI-compatible",
    ),
    "check": ("calibrate.check.check_command", "predict a fleet, run it for real, and tell how far apart the two are"),
    "models": (
        "real.experts.models_command",
        "make checkpoints in a model's true shape, where its weights are not at hand",
    ),
    "router": ("real.router.router_command", "fit the classifier of prompts, ask it why, and tell what it is worth"),
    "schema": ("sim.schema_command", "print the JSON Schema of fleet files, for editors"),
}

OF_SERVE = ("httptools", "prometheus_client", "tokenizers", "uvloop")
"""Packages of the extra ``serve``, without which fleets can be simulated only."""


class LazyGroup(click.Group):
    """A group that knows its commands by name and one line, and imports a command only to run it or show its help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command; None when there is none of that name."""
        if cmd_name not in COMMANDS:
            return None
        command = import_module(COMMANDS[cmd_name][0]).command
        assert isinstance(command, click.Command)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; what is not installed is told in one line, wherever it is found missing."""
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            if error.name not in OF_SERVE:
                raise
            engines = "with vLLM, [gpu], or without a GPU make install-cpu"
            click.echo(f"this needs {error.name}: pip install 'expert-router[serve]'; {engines}", err=True)
            ctx.exit(2)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


def _show_version(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    if value and not ctx.resilient_parsing:
        from sim.run import program_version

        click.echo(f"expert-router {program_version()}")
        ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_version, help="Print the version."
)
def main() -> None:
    """Size LLM fleets: Llama experts behind a prompt router, from 1 to thousands of users."""


if __name__ == "__main__":
    main()
