"""What the commands of ``bcmi`` have in common: options, progress, tables, whole files, plan arguments."""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

PresetOption = Annotated[str, typer.Option(help="small, paper-ls, paper-hs, or a .toml file.")]
BeamlineOption = Annotated[str, typer.Option(help="Beamline configuration: sim-id01, or a .toml file.")]
SeedOption = Annotated[int, typer.Option(help="Of every random number; same seed, same result.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
DirectoryOption = Annotated[
    Path, typer.Option(help="Where the session keeps catalogue, documents and frames.")
]
SimOption = Annotated[
    str | None, typer.Option("--sim", help="Start the simulated beamline with this preset for the command.")
]
ArgumentsArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Parameters of the plan.")
]


class Display:
    """Progress bars on a terminal's stderr; in a pipe, silence or one plain line per stage."""

    def __init__(self, announce: bool = False) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._console = Console(stderr=True)
        self._announce = announce and not self._console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description:<46}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    @contextmanager
    def stage(self, title: str) -> Iterator[Any]:
        """Show one stage of work; yields ``progress(fraction, message)``."""
        if self._announce:
            print(title, file=sys.stderr, flush=True)
        task = self._progress.add_task(title, total=1.0, note="")

        def progress(fraction: float, message: str) -> None:
            self._progress.update(task, completed=fraction, note=message)

        yield progress
        self._progress.update(task, completed=1.0)


@contextmanager
def shown(title: str) -> Iterator[Any]:
    """Show one stage of work on a display of its own; yields ``progress(fraction, message)``."""
    with Display() as display, display.stage(title) as progress:
        yield progress


def print_table(rows: dict[str, Any], title: str) -> None:
    """Print names and values on stdout, floats to four digits."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, show_header=False, title_justify="left")
    for key, value in rows.items():
        table.add_row(escape(str(key)), f"{value:.4g}" if isinstance(value, float) else escape(str(value)))
    Console(emoji=False).print(table)


def atomically(path: Path, write) -> None:
    """Let ``write(beside)`` make the file, then rename it: never half a file."""
    from bcmi_beamline.data import FileError

    if not path.parent.is_dir():
        raise FileError(f"{path}: the folder {path.parent} does not exist; make it first")
    beside = path.with_name(f".{path.name}.{os.getpid()}{path.suffix}")
    try:
        write(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def find_plan(name: str):
    """The plan called `name`: a generator function of `bcmi_beamline.plans` that takes devices first."""
    from bcmi_beamline.session import list_plans

    known = list_plans()
    name = name.replace("-", "_")
    if name not in known:
        raise ValueError(f"no plan named {name!r}: choose from {', '.join(sorted(known))}")
    return known[name]


def parse_arguments(plan, pairs: list[str]) -> dict[str, Any]:
    """Turn ``key=value`` words into checked keyword arguments of `plan`."""
    from pydantic import TypeAdapter, ValidationError

    parameters = dict(list(inspect.signature(plan).parameters.items())[1:])
    values = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or key not in parameters:
            raise ValueError(f"{pair!r}: give key=value with a key of {', '.join(parameters)}")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        annotation = parameters[key].annotation
        try:
            values[key] = TypeAdapter(annotation).validate_python(value)
        except ValidationError as error:
            raise ValueError(f"{key}={text}: {error.errors()[0]['msg']}") from None
    missing = [k for k, p in parameters.items() if p.default is p.empty and k not in values and p.kind < 4]
    if missing:
        raise ValueError(f"{plan.__name__} also needs {', '.join(missing)}")
    return values
