"""What a command says of wrong words: the message alone, and a hint if a list was written with spaces."""

from __future__ import annotations

import re

import click

from .errors import DanteError
from .files import printable


class Commands(click.Group):
    """Show the errors of this package as one message, without a traceback, and wrong words with a hint."""

    def invoke(self, ctx: click.Context):
        """Run a command."""
        try:
            return super().invoke(ctx)
        except DanteError as error:
            raise click.ClickException(printable(str(error))) from error
        except click.UsageError as error:
            if not (said := hint(error)):
                raise
            raise click.UsageError(f"{error.format_message()} {said}", ctx=error.ctx) from error


def hint(error: click.UsageError) -> str:
    """Return how several values of an option are given, if the word that `error` refuses looks like one of them."""
    if error.ctx is None:
        return ""
    unexpected = "unexpected extra argument" in error.message
    words = re.findall(r"[^\s'()]+", " ".join(re.findall(r"'[^']*'|\([^)]*\)", error.message)))
    arguments = [p for p in error.ctx.command.params if isinstance(p, click.Argument)]
    taken = [str(error.ctx.params[p.name]) for p in arguments if p.name in error.ctx.params]
    for option in error.ctx.command.params:
        given = error.ctx.params.get(option.name or "")
        if not isinstance(option, click.Option) or not given or not _takes_several(option):
            continue
        values = [given] if isinstance(given, str) else [str(value) for value in given]
        pairs = "=" in values[-1]
        stray = [word for word in [*taken, *words] if "=" in word] if pairs else [
            word for word in words if "=" not in word and (unexpected or _is_number(word))]
        if stray and (pairs or unexpected or _is_number(values[-1])):
            return _advice(option, [*values, *stray], shown=pairs or not arguments or not unexpected)
    return ""


def _takes_several(option: click.Option) -> bool:
    return option.multiple or "," in (option.metavar or "")


def _advice(option: click.Option, values: list[str], *, shown: bool) -> str:
    """Return the right spelling; with `shown`, that of the user's own values."""
    name, metavar = option.opts[-1], option.metavar or ""
    if "," in metavar or metavar == "NAME=VALUE ...":
        example = ",".join(values) if shown else metavar.split("|")[-1]
        return f"Values of {name} stand together, with commas and without spaces: {name} {example}"
    return f"Give {name} again for each value: " + " ".join(f"{name} {value}" for value in values)


def _is_number(word: str) -> bool:
    return re.fullmatch(r"-?\d*\.?\d+", word) is not None
