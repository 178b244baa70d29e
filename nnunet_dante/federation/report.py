"""The history of a federation for people: Dice by round, site and label, bytes on the wire, and who was left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from ..compare.plots import save, tidy
from ..compare.report import Block, Heading, Listing, Picture, Text, write_pages
from ..compare.tables import Table
from ..datasets.views import new_figure
from ..files import read_json
from .settings import Settings

_MIB = 2**20


def write_history_report(run: Path, settings: Settings) -> Path:
    """Write report.html, report.md and dice.png beside history.json in `run`; return the path of report.md.

    run: folder run of a federation. settings: the federation's.
    """
    history = read_json(run / "history.json")
    _plot(history, run / "dice.png")
    blocks = [*_head(history, settings), Picture("dice.png", "Pseudo Dice of each site's validation cases, mean of its "
                                                             "labels, at the start of each round"),
              *_rounds(history), *_left_out(history)]
    return write_pages(f"Federation {settings.name}", blocks, run)


def _head(history: Mapping[str, Any], settings: Settings) -> Iterator[Block]:
    sites = sorted({site for entry in history["rounds"] for site in entry["sites"]})
    yield Text(f"{len(history['rounds'])} rounds of {settings.epochs} epochs with {len(sites)} sites "
               f"({', '.join(sites)}). Method {settings.method}, {settings.averaging} averaging; at each site stays: "
               f"{', '.join(settings.local) or 'nothing of what is trained'}. Dice is nnU-Net's pseudo Dice on patches "
               "of each site's own validation cases, where completed labels count as drawn.")
    final = history.get("final_dice", {})
    rows = [[site, *(_number(final[site].get(label)) for label in settings.foreground)] for site in sorted(final)]
    yield Table(name="final", title="Dice of the final network", head=["site", *settings.foreground], rows=rows,
                records=[{"site": site, **dice} for site, dice in sorted(final.items())])


def _rounds(history: Mapping[str, Any]) -> Iterator[Block]:
    rows = []
    for entry in history["rounds"]:
        for site, told in sorted(entry["sites"].items()):
            rows.append([str(entry["round"] + 1), site, str(told["cases"]), _number(_mean(told["dice_before"])),
                         _number(_mean(told["dice_after"])), f"{told['length']:.3g}",
                         f"{told['bytes_down'] / _MIB:.3f}", f"{told['bytes_up'] / _MIB:.3f}"])
    head = ["round", "site", "cases", "Dice before", "Dice after", "length of update", "MiB to the site", "MiB back"]
    yield Table(name="rounds", title="Rounds", head=head, rows=rows,
                records=[dict(zip(head, row)) for row in rows])


def _left_out(history: Mapping[str, Any]) -> Iterator[Block]:
    lines = [f"{site} was refused: {reason}" for site, reason in history.get("refused", {}).items()]
    lines += [f"round {entry['round'] + 1}, {site}: {reason}" for entry in history["rounds"]
              for site, reason in entry["left_out"].items()]
    if lines:
        yield Heading("Left out")
        yield Listing(lines)


def _plot(history: Mapping[str, Any], file: Path) -> None:
    figure, ((axis,),) = new_figure(7, 3.5)
    for site in sorted({site for entry in history["rounds"] for site in entry["sites"]}):
        points = [(entry["round"], _mean(entry["sites"][site]["dice_before"])) for entry in history["rounds"]
                  if site in entry["sites"]]
        points += [(len(history["rounds"]), _mean(history["final_dice"][site]))] * (
            site in history.get("final_dice", {}))
        axis.plot(*zip(*points), marker="o", label=site)
    axis.set(xlabel="finished rounds", ylabel="pseudo Dice")
    axis.legend(frameon=False)
    tidy(axis)
    save(figure, file)


def _mean(dice: Mapping[str, float | None]) -> float:
    known = [value for value in dice.values() if value is not None]
    return mean(known) if known else float("nan")


def _number(value: float | None) -> str:
    return "" if value is None or value != value else f"{value:.3f}"
