"""The command line. Heavy modules are imported inside the commands, so that `nnunet-dante --help` answers at once."""

from __future__ import annotations

from pathlib import Path

import click

from . import __version__
from . import cli_options as shared
from .cli_adapter import adapter
from .cli_compare import benchmark, compare, shots
from .cli_dataset import dataset
from .cli_federate import federate
from .cli_words import Commands
from .files import printable


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def main() -> None:
    """Fine-tune pretrained nnU-Net v2 networks on few labelled cases, and share the result.

    A usual order of commands: suggest, transfer, train, then nnU-Net's nnUNetv2_predict; compare and export as needed.
    """


for _command in (adapter, benchmark, compare, dataset, federate, shots):
    main.add_command(_command)


@main.command()
@click.option("--out", type=shared.FOLDER, default="nnunet-dante-demo", show_default=True,
              help="Folder for all results.")
@click.option("--data", type=shared.FOLDER,
              help="Folder that holds the images (or the wheel with them), instead of a download.")
def demo(out: Path, data: Path | None) -> None:
    """Adapt a CT network to MR images, in minutes on a CPU.

    A small network, which was trained on the CT of a spine, comes with the package. `adapt` does with it what it does
    with yours, and it ends with the same report.
    """
    from .demo.run import run_demo

    click.echo(str(run_demo(out, data=data)))


@main.command()
@click.argument("source", type=shared.MODEL)
@shared.dataset
@shared.network
@click.option("-p", "--plans-name", default="nnUNetDantePlans", show_default=True, help="Name of the plans to write.")
@click.option("--batch-size", type=click.IntRange(1), help="Replaces the donor's batch size.")
@shared.geometry
@click.option("--intensity", type=click.Choice(["donor", "target"]),
              help="Whose intensity statistics are used to normalise CT. Default: as --geometry.")
@click.option("--invert", multiple=True, metavar="CHANNEL",
              help="A channel in which bright and dark are exchanged compared with the donor's images; repeatable.")
@click.option("--mirroring", type=click.Choice(["donor", "none", "all"]), default="donor", show_default=True,
              help="Axes along which training and prediction mirror images; none where labels tell left from right.")
@shared.keep_labels
@click.option("--rename", multiple=True, metavar="OLD=NEW",
              help="A label of the donor and its name in your data set; repeatable.")
@click.option("--into", metavar="DATASET", help="Name of the completed data set. Default: the next free number.")
@click.option("--rehearse", type=shared.FOLDER,
              help="Folder with imagesTr and labelsTr of the donor's own data, to be mixed into the training.")
@click.option("--share", type=click.FloatRange(0, 1, min_open=True, max_open=True), default=0.25, show_default=True,
              help="Part of the training patches that come from --rehearse.")
@click.option("--preprocess", is_flag=True, help="Run nnUNetv2_preprocess afterwards.")
@click.option("--epochs", type=click.IntRange(1),
              help="Number of epochs. This and the next five options replace the trainers' numbers.")
@click.option("--iterations", type=click.IntRange(1), help="Training steps per epoch.")
@click.option("--val-iterations", type=click.IntRange(1), help="Validation steps per epoch.")
@click.option("--lr", type=click.FloatRange(0, min_open=True), help="Learning rate.")
@click.option("--rank", type=click.IntRange(1), help="Rank of the low-rank factors (LoRA).")
@click.option("--alpha", type=click.FloatRange(0, min_open=True),
              help="The update of a low-rank method is multiplied by alpha / rank.")
@shared.settings
@click.option("-tr", "--trainer", help="The trainer that the printed training command names. Default: one that fits "
              "SOURCE.")
@shared.memory
def transfer(source: Path, dataset: str, epochs, iterations, val_iterations, lr, rank, alpha, settings,
             keep_labels, rename, memory: str | None, **options) -> None:
    """Make a pretrained nnU-Net the start of a training.

    SOURCE is a model folder, a zip from nnUNetv2_export_model_to_zip, a single checkpoint file, or the name of a model
    of TotalSegmentator, such as totalsegmentator:291. `nnunet-dante donors` lists what is on this machine.
    """
    if wrong := [text for text in rename if "=" not in text]:
        raise click.BadParameter(f"{wrong[0]!r} is not OLD=NEW.", param_hint="--rename")

    from .models.memory import gib, memory_advice
    from .models.overrides import parse_overrides
    from .transfers.transfer import transfer as run

    limit = gib(memory) if memory else None
    flags = {"epochs": epochs, "iterations": iterations, "val_iterations": val_iterations, "lr": lr, "rank": rank,
             "alpha": alpha}
    overrides = {k: v for k, v in flags.items() if v is not None}
    if twice := overrides.keys() & (parsed := parse_overrides(settings)).keys():
        raise click.BadParameter(f"{min(twice)} has a flag of its own; give either the flag or --set, not both.",
                                 param_hint="--set")
    report = run(source, dataset, overrides=overrides | parsed, rename=dict(text.split("=", 1) for text in rename),
                 keep_labels=shared.split_words(keep_labels), **options)
    advice = [memory_advice(report.memory_gib, limit, report.batch_size)] if limit else []
    click.echo("\n".join([str(report), *advice]))


@main.command()
@click.argument("model", type=shared.MODEL)
@click.argument("source", type=shared.EXISTING_FOLDER)
@click.option("-o", "--out", type=shared.FOLDER, required=True, help="Folder for everything that is written.")
@click.option("-n", "--name", help="Name of the data set, such as Dataset123_Mine. Default: that of SOURCE.")
@shared.configuration
@click.option("-tr", "--trainer", help="Instead of the trainer that is advised.")
@click.option("--budget", default="60min", show_default=True, metavar="TIME", help="For all trainings: 90min, 2h.")
@click.option("--baseline", is_flag=True, help="Also train from scratch, to compare; takes half of the budget.")
@shared.keep_labels
@shared.geometry
@click.option("--labels", multiple=True, metavar="NAME=VALUE,...", help="What values in masks mean; see `dataset`.")
@click.option("--channels", multiple=True, metavar="NAME,...", help="Names of the channels, such as CT; see `dataset`.")
@click.option("--groups", type=shared.EXISTING_FILE, help="Which cases are of one patient; as for `shots`.")
@shared.settings
@shared.device
@shared.memory
@shared.trust
def adapt(model: Path, source: Path, out: Path, budget: str, settings: tuple[str, ...], keep_labels,
          memory: str | None, **options) -> None:
    """Adapt MODEL to the labelled images in SOURCE: data, advice, trainings, scores, report and model in one command.

    SOURCE holds images and masks, in nnU-Net's format or in a layout that `dataset` recognises. Stopped at any moment,
    the same command goes on.
    """
    from .adaptation.budget import minutes
    from .adaptation.run import adapt as run
    from .models.memory import gib
    from .models.overrides import parse_overrides

    click.echo(str(run(model, source, out, budget_minutes=minutes(budget), overrides=parse_overrides(settings),
                       keep_labels=shared.split_words(keep_labels), memory_gib=gib(memory) if memory else None,
                       **options)))


@main.command()
@click.argument("model", type=shared.MODEL)
@click.argument("images", type=shared.EXISTING_FOLDER)
@click.option("-o", "--masks", type=shared.FOLDER, required=True, help="New folder for the masks and the table.")
@click.option("--overlays", is_flag=True, help="Also draw the mask of each case on its image, as PNG.")
@shared.configuration
@shared.device
@shared.trust
@click.pass_context
def predict(context: click.Context, model: Path, images: Path, masks: Path, **options) -> None:
    """Segment the images in a folder, and say which cases to look at first.

    MODEL is the folder OUT of `adapt`; or a model folder, a zip that nnU-Net exported, or a checkpoint. IMAGES has any
    layout that `dataset` recognises. Stopped at any moment, the same command goes on.
    """
    from .adaptation.predict import predict as run

    done = run(model, images, masks, **options)
    click.echo(printable(str(done)))
    context.exit(1 if done.problems else 0)


@main.command()
@shared.dataset
@click.option("--from", "source", type=shared.MODEL, required=True,
              help="The donor: model folder, exported zip or checkpoint, as for transfer.")
@shared.network
@click.option("--train-fold",
              help="The fold of your data set that you will train. Default: 0, or all if there is one case.")
def suggest(source: Path, dataset: str, **options) -> None:
    """Measure a donor on your cases, and advise what to train.

    The advice is a trainer, a rank, an opening order and the commands to run, each with its reason.
    """
    from .advise.suggest import suggest as run

    click.echo(str(run(source, dataset, **options)))


@main.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def train(arguments: tuple[str, ...]) -> None:
    """Run nnUNetv2_train with the trainers of this package. The arguments are those of nnUNetv2_train."""
    from .training.launch import train as run

    run(arguments)


@main.command()
def env() -> None:
    """Print the line that lets nnUNetv2_train find the trainers. Use it as eval "$(nnunet-dante env)"."""
    from .training.launch import export_line

    click.echo(export_line())


@main.command()
def doctor() -> None:
    """Check the installation, and say what to do.

    The checks are: versions, folders, whether nnU-Net finds the trainers, and whether gradients reach what is trained.
    """
    from .command.doctor import diagnose

    ok = True
    for check in diagnose():
        ok &= check.passed
        click.echo(f"[{'ok' if check.passed else 'FAIL'}] {check.name}: {check.seen}")
    if not ok:
        raise click.ClickException("at least one check failed; the lines above say what to do.")


@main.command()
@click.argument("folders", nargs=-1, type=shared.EXISTING_FOLDER)
def donors(folders: tuple[Path, ...]) -> None:
    """List the models on this machine that can be donors.

    It looks in nnUNet_results, in TotalSegmentator's folder of weights, and in FOLDERS.
    """
    from .command.donors import list_donors

    click.echo(list_donors(folders))


@main.command()
@click.argument("path", type=shared.MODEL)
def inspect(path: Path) -> None:
    """Show what a model file holds, without running code in it.

    PATH is a model folder, zip, checkpoint, adapter, plans or .model file.
    """
    from .command.inspect import inspect_path

    click.echo(inspect_path(path))


@main.command()
@click.argument("model_folder", type=shared.MODEL)
@click.option("-o", "--output", type=shared.ANY_PATH, required=True,
              help="NAME.model, or the models folder of a Dafne client.")
@shared.network
@click.option("--categories", multiple=True,
              help="Category in Dafne's model browser, such as Abdomen/Kidney; repeatable.")
@click.option("--info", multiple=True, help="KEY=TEXT that Dafne's model browser shows; repeatable.")
@click.option("--base", type=shared.EXISTING,
              help="A .model file whose model id is taken over, so that Dafne can merge the two.")
@click.option("--orientation", help="Orientation of the training files, such as RAS. Default: read from the files.")
@click.option("--mirroring", is_flag=True, help="Average over mirrored images, as nnU-Net does; 4 to 8 times slower.")
@click.option("--tile-step", type=click.FloatRange(0, 1, min_open=True), default=0.5, show_default=True,
              help="Distance between neighbouring windows, as a share of the patch; larger is faster.")
@click.option("--protection", type=click.FloatRange(0), default=0.0, show_default=True,
              help="How strongly learning in Dafne is pulled back to the weights that it starts from.")
def export(model_folder: Path, output: Path, categories, info, **options) -> None:
    """Write a model as a .model file for Dafne.

    A NAME.json is written beside it. The Dafne client needs neither nnU-Net nor this package.

    MODEL_FOLDER is a model folder, a zip from nnUNetv2_export_model_to_zip, or a single checkpoint file.
    """
    if wrong := [text for text in info if "=" not in text]:
        raise click.BadParameter(f"{wrong[0]!r} is not KEY=TEXT.", param_hint="--info")

    from .dafne.export import export_model

    texts = dict(text.split("=", 1) for text in info)
    click.echo(str(export_model(model_folder, output, categories=categories or None, info=texts, **options)))


@main.command("import")
@click.argument("model", type=shared.EXISTING)
@click.option("-o", "--output", type=shared.FOLDER, required=True, help="The nnU-Net model folder to write.")
def import_(model: Path, output: Path) -> None:
    """Turn a .model file of Dafne back into an nnU-Net model.

    MODEL is a file that `export` wrote, also after learning and merging in Dafne.
    """
    from .dafne.importer import import_model

    click.echo(str(import_model(model, output)))


@main.command()
@click.argument("fold_folder", type=shared.EXISTING)
@click.option("--cases", type=shared.EXISTING, help="Folder with imagesTr and labelsTr of cases that were not trained "
              "on; default: what the training found on its validation cases.")
@click.option("--set", "strength", type=click.FloatRange(0), help="Set this strength instead of choosing one: 0 is the "
              "start, 1 all that was learned.")
@click.option("--curve", "plot", type=shared.FILE, help="PNG file for a plot of Dice over strength; given alone, "
              "nothing else is written.")
def strength(fold_folder: Path, cases: Path | None, strength: float | None, plot: Path | None) -> None:
    """Choose how much of what was learned a finished training keeps: the strength with the highest Dice.

    FOLD_FOLDER is TRAINER__PLANS__CONFIGURATION/fold_X of this package's trainers. Its checkpoint_final.pth and adapter
    are written anew; all that was learned stays in them.
    """
    from .command.strength import set_strength

    click.echo(set_strength(fold_folder, strength, cases=cases, plot=plot))


@main.command()
@click.option("--host", default="127.0.0.1", show_default=True,
              help="Address to listen at; 0.0.0.0 lets other machines in, with the token.")
@click.option("--port", type=click.IntRange(0, 65535), default=8765, show_default=True,
              help="The first port that is tried.")
@click.option("--root", "roots", multiple=True, type=shared.FOLDER,
              help="Folder that the page may look into; repeatable. Default: home, and nnU-Net's folders.")
@click.option("--no-browser", is_flag=True, help="Only print the address.")
def ui(host: str, port: int, roots: tuple[Path, ...], no_browser: bool) -> None:
    """Open a page in the browser that adapts, shows and exports networks.

    It does what the other commands do. Needs the extra `ui`: pip install "nnunet-dante[ui]".
    """
    from .ui.server import serve

    serve(host=host, port=port, roots=roots, browser=not no_browser, say=click.echo)


if __name__ == "__main__":
    main()
