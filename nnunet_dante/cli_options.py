"""Options that several commands have, and the kinds of paths that they take."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import click


class ModelPath(click.Path):
    """A model that exists, or the name of one of TotalSegmentator's; checked before anything slow is imported."""

    def __init__(self) -> None:
        super().__init__(exists=True, path_type=Path)

    def convert(self, value, param, ctx):
        """Return the path; a name such as totalsegmentator:291 is looked up later."""
        if str(value).lower().startswith("totalsegmentator:"):
            return Path(value)
        return super().convert(Path(value).expanduser(), param, ctx)


MODEL = ModelPath()
ANY_PATH = click.Path(path_type=Path)
EXISTING = click.Path(exists=True, path_type=Path)
EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)
EXISTING_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)

dataset = click.option("-d", "--dataset", required=True, help="Your data set in nnUNet_raw: number or name.")
configuration = click.option("-c", "--configuration", help="For example 3d_fullres; needed if the model holds several.")
geometry = click.option("--geometry", type=click.Choice(["donor", "target"]), default="donor", show_default=True,
                        help="Whose spacing and patch size are used; target: as nnU-Net plans them for your data.")
keep_labels = click.option(
    "--keep-labels", multiple=True, metavar="all|NAME,...",
    help="Labels of the donor to keep although your masks lack them: the donor completes your masks, in a data set of "
         "their own. `none`: not even labels that dataset.json calls undrawn. Repeatable.")
settings = click.option("--set", "settings", multiple=True, metavar="KEY=VALUE",
                        help="Any option of the training, such as rank=4 or l2_sp=0.01; repeatable.")
device = click.option("--device", type=click.Choice(["cuda", "mps", "cpu"]), help="Default: the best that torch finds.")
memory = click.option("--memory", metavar="SIZE",
                      help="Memory of your GPU, such as 6GiB: says what makes a training fit it.")
trust = click.option("--trust", is_flag=True,
                     help="Also read a checkpoint that runs code when it is loaded. Only if you know its author.")


def network(command: Callable) -> Callable:
    """Add the options that say which network of a model is meant, and whether it may run code."""
    for option in (trust, click.option("--checkpoint", default="checkpoint_final.pth", show_default=True,
                                       help="Checkpoint of the fold."),
                   click.option("--fold", help="Fold of the model. Default: fold_all, else the first one found."),
                   configuration):
        command = option(command)
    return command


def split_words(texts: Iterable[str]) -> list[str]:
    """Return the words of an option that may be given several times, each time with commas between words."""
    return [word.strip() for text in texts for word in text.split(",") if word.strip()]
