"""The commands `nnunet-dante federate ...`; heavy modules are imported inside them, as in cli.py."""

from __future__ import annotations

from pathlib import Path

import click

from . import cli_options as shared


@click.group()
def federate() -> None:
    """Train one network at several sites, which send only what they trained.

    The founder runs `new` and sends the folder to all sites; each site runs `join`. Flower (nnunet-dante[flower])
    carries the messages.
    """


@federate.command("new")
@click.argument("folder", type=shared.FOLDER)
@click.option("--donor", required=True, type=shared.MODEL, help="The pretrained network, as for transfer.")
@click.option("--labels", multiple=True, metavar="NAME,...",
              help="Labels of all sites together. Default: the donor's. Repeatable.")
@click.option("--method", default="LoRA", show_default=True,
              help="What is trained: the name of a trainer without nnUNetTrainer, such as FineTune.")
@click.option("--averaging", type=click.Choice(["alternating", "frozen"]), default="alternating", show_default=True,
              help="Which low-rank factor is trained: the two in turns, or only B.")
@click.option("--local", type=click.Choice(["norms", "heads"]), multiple=True,
              help="What stays at each site instead of being averaged; repeatable.")
@click.option("--rounds", type=click.IntRange(1), default=10, show_default=True, help="Number of rounds.")
@click.option("--epochs", type=click.IntRange(1), default=5, show_default=True,
              help="Epochs of each site in each round.")
@click.option("--prox", type=click.FloatRange(0), default=0.0, show_default=True,
              help="Strength of the pull to the weights at the start of the round (FedProx).")
@shared.settings
@shared.network
def federate_new(folder: Path, labels: tuple[str, ...], settings: tuple[str, ...], **options) -> None:
    """Write FOLDER, from which all sites train one network: start weights, settings, and a Flower app.

    The settings of the training are fixed now; those of the server are in FOLDER/pyproject.toml.
    """
    from .federation.create import new_federation
    from .models.overrides import parse_overrides

    click.echo(new_federation(folder, labels=shared.split_words(labels), overrides=parse_overrides(settings),
                              **options))


@federate.command("join")
@click.argument("folder", type=shared.EXISTING_FOLDER)
@shared.dataset
@click.option("--site", required=True, help="The name of your site in the history: letters, digits, _ and -.")
@click.option("--fold", help="Whose validation cases give the Dice. Default: 0, or all if there is one case.")
@shared.device
@click.option("--num-processes", type=click.IntRange(1), help="For preprocessing. Default: nnU-Net's.")
@click.option("--superlink", default="HOST:PORT", show_default=True, help="The server, for the printed command.")
def federate_join(folder: Path, superlink: str, **options) -> None:
    """Prepare your data for the federation in FOLDER, and print the command that connects your site.

    Labels of the federation that your masks lack are completed by the start network, as `transfer --keep-labels` does.
    """
    from .federation.join import join_federation

    site = join_federation(folder, **options)
    click.echo(f"{site.facts.site} fits: {site.dataset}, {site.facts.cases} training cases of fold {site.fold}, draws "
               f"{', '.join(site.facts.draws)}.\nLeave this running, with nnUNet_raw, nnUNet_preprocessed and "
               "nnUNet_results set as now:\n"
               f"flower-supernode --superlink {superlink} --root-certificates ca.crt "
               f"--node-config 'dataset=\"{site.dataset}\"'\n"
               "For a test on this machine alone, --insecure instead of --root-certificates ca.crt. A second SuperNode "
               "on one machine needs a --port of its own.")
