"""The commands for adapter files, `nnunet-dante adapter ...`; heavy modules are imported inside them, as in cli.py."""

from __future__ import annotations

from pathlib import Path

import click

from . import cli_options as shared


@click.group()
def adapter() -> None:
    """Make, apply, remove or describe adapter files.

    An adapter holds only what was trained, in a few MB, without the base network.
    """


@adapter.command("extract")
@click.argument("checkpoint", type=shared.EXISTING)
@click.option("-o", "--output", type=shared.ANY_PATH, required=True,
              help="The adapter.safetensors to write; with --format peft, the folder.")
@click.option("--format", "form", type=click.Choice(["file", "peft"]), default="file", show_default=True,
              help="peft writes a folder for Hugging Face PEFT; for checkpoints of nnUNetTrainerLoRAFlat only.")
def adapter_extract(checkpoint: Path, output: Path, form: str) -> None:
    """Write what was trained in CHECKPOINT as an adapter."""
    from .adapters.adapter import extract, info

    extract(checkpoint, output, form=form)
    click.echo(info(output))


@adapter.command("apply")
@click.argument("base", type=shared.EXISTING)
@click.argument("adapter_file", metavar="ADAPTER", type=shared.EXISTING)
@click.option("-o", "--output", type=shared.FILE, required=True, help="The checkpoint to write.")
def adapter_apply(base: Path, adapter_file: Path, output: Path) -> None:
    """Merge ADAPTER (a file, or a folder of PEFT) into the checkpoint BASE on which it was trained.

    BASE is not the donor, but the start weights that `transfer` made of it: PLANS_CONFIGURATION_start.pth in
    nnUNet_preprocessed.
    """
    from .adapters.adapter import apply

    apply(base, adapter_file, output)
    click.echo(f"Wrote {output}")


@adapter.command("merge")
@click.argument("adapters", nargs=-1, required=True, type=shared.EXISTING)
@click.option("-o", "--output", type=shared.FILE, required=True, help="The adapter.safetensors to write.")
@click.option("--weights", metavar="W,W,...", help="A number for each adapter, such as 0.7,0.3; default: the average.")
@click.option("--base", type=shared.EXISTING,
              help="The start weights of the trainings; a message says when they are needed.")
def adapter_merge(adapters: tuple[Path, ...], output: Path, weights: str | None, base: Path | None) -> None:
    """Write the weighted sum of ADAPTERS that were trained on one base as one adapter.

    The folds of one training make one network that way. Adapters that learned different things can be added with
    --weights 1,1, but only a test can tell whether the sum works.
    """
    try:
        shares = None if weights is None else [float(word) for word in weights.split(",")]
    except ValueError:
        raise click.BadParameter(f"{weights!r} is not a list such as 0.7,0.3.", param_hint="--weights") from None

    from .adapters.merge import merge

    click.echo(merge(adapters, output, weights=shares, base=base))


@adapter.command("remove")
@click.argument("checkpoint", type=shared.EXISTING)
@click.option("-o", "--output", type=shared.FILE, required=True, help="The checkpoint to write.")
def adapter_remove(checkpoint: Path, output: Path) -> None:
    """Write the base of CHECKPOINT: its weights as they were before the training, bit for bit."""
    from .adapters.adapter import remove

    remove(checkpoint, output)
    click.echo(f"Wrote {output}")


@adapter.command("info")
@click.argument("adapter_file", metavar="ADAPTER", type=shared.EXISTING)
def adapter_info(adapter_file: Path) -> None:
    """Show how ADAPTER was made, and to which base it belongs."""
    from .adapters.adapter import info

    click.echo(info(adapter_file))
