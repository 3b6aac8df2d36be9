"""``expert-router models``: make and list reference models."""

from pathlib import Path

import click
from rich.console import Console

from sim.report import wide_console

QUANTIZATIONS = ("bf16", "int8", "awq", "gptq", "fp8")


@click.group("models", context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Checkpoints in a catalogue model's true shape, without weights: served with random ones."""


@command.command("make")
@click.argument("name")
@click.option("--quantization", type=click.Choice(QUANTIZATIONS), default="bf16", show_default=True, help="Format.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder; default: among the others.")
def make(name: str, quantization: str, out: Path | None) -> None:
    """Write the checkpoint folder of the catalogue's model NAME: configuration and tokenizer, no weights.

    vLLM fills it with random weights (load_format=dummy): its answers are noise, its speed and memory the model's.
    ``serve`` makes what a fleet needs by itself.
    """
    from real.experts.reference_models import make_reference_model

    messages = Console(stderr=True)
    try:
        made = make_reference_model(name, quantization, out)
    except (ValueError, OSError) as error:
        messages.print(str(error), style="red", highlight=False, markup=False, soft_wrap=True)
        raise SystemExit(2) from None
    click.echo(made.folder)
    messages.print(
        f"{made.model} in {made.quantization}, vocabulary {made.vocab_size} ({made.tokenizer_tokens} tokens learned, "
        "the rest reserved); no weights, random ones when served",
        highlight=False,
        soft_wrap=True,
    )


@command.command("list")
def list_models() -> None:
    """Show which models can be made and which are there."""
    from rich.table import Table

    from real.experts.reference_models import llama_shapes, made_models, models_folder

    made = made_models()
    table = Table(title=f"reference models in {models_folder()}", title_justify="left")
    for column in ("model", "parameters", "vocabulary", "made in"):
        table.add_column(column, justify="right" if column in ("parameters", "vocabulary") else "left")
    for shape in llama_shapes():
        there = [each.quantization for each in made if each.model == shape.name]
        table.add_row(shape.name, f"{shape.parameters_total / 1e6:,.0f}M", str(shape.vocab_size), ", ".join(there))
    wide_console().print(table)
