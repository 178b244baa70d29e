"""The command `nnunet-dante dataset`; heavy modules are imported inside it, as in cli.py."""

from __future__ import annotations

from pathlib import Path

import click

from . import cli_options as shared
from .files import printable


@click.command(context_settings={"allow_extra_args": True})
@click.argument("source", type=shared.EXISTING_FOLDER)
@click.option("-d", "--dataset", "number", type=click.IntRange(1, 999), required=True, help="Number of the data set.")
@click.option("-n", "--name", required=True, help="Name of the data set, such as Mine for Dataset123_Mine.")
@click.option("-o", "--output", type=shared.FOLDER, help="Folder in which the data set is made. Default: nnUNet_raw.")
@click.option("--labels", multiple=True, metavar="NAME=VALUE ...",
              help="What the values in the masks mean, or the file of a table; names alone choose from masks by label.")
@click.option("--channels", multiple=True, metavar="NAME,...",
              help="Names of the channels in their order. nnU-Net normalises CT by this name.")
@click.option("--masks", multiple=True, metavar="PATTERN",
              help='Which files are masks, where names do not tell it, such as "*/liver*"; repeatable.')
@click.option("--without", multiple=True, metavar="CASE,...", help="Cases to leave out.")
@click.option("--groups", type=shared.EXISTING_FILE,
              help="JSON {patient: [cases]} or CSV case,patient: cases of one patient.")
@click.option("--resample-masks", is_flag=True, help="Bring masks on another grid to the grid of their image.")
@click.option("--mask-axes", type=click.Choice(["screen", "xyz"]),
              help="Order of the axes in Dafne's masks, where shapes do not tell it: screen if drawn by hand, xyz if "
              "by a 3D model.")
@click.option("--orientation", metavar="CODES",
              help="Where rows, columns and slices lead in .npz files without affine, such as PLS.")
@click.option("--copy", is_flag=True, help="Copy files instead of linking them.")
@click.option("--dry-run", is_flag=True, help="Say what was found and what is wrong; write nothing.")
@click.pass_context
def dataset(context: click.Context, source: Path, number: int, name: str, labels: tuple[str, ...], **options) -> None:
    """Turn a folder of images and masks into an nnU-Net data set.

    How the files lie is found out and said: images and masks in two folders or beside each other, one folder per
    patient, a mask per label or one mask with integers, files of Dafne or Dante, the Medical Segmentation Decathlon, or
    nnU-Net's own format.
    Nothing in SOURCE is changed.
    """
    if wrong := [word for word in context.args if "=" not in word]:
        raise click.UsageError(f"Got unexpected extra argument ({wrong[0]}): it is neither the SOURCE nor a label "
                               "NAME=VALUE.", context)

    from .datasets.gather.gather import gather

    gather(source, number, name, labels=(*labels, *context.args), say=lambda line: click.echo(printable(line)),
           **options)
