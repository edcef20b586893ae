"""The ``bcmi`` command.

Bad input ends with one line on stderr and exit status 2, an interrupted plan with 130; results go to stdout,
progress to a terminal's stderr only. Heavy rooms are imported inside the commands, so ``--help`` is quick.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from bcmi_beamline import beamline_commands
from bcmi_beamline.cli_parts import (
    ArgumentsArgument,
    BeamlineOption,
    DirectoryOption,
    Display,
    JsonOption,
    PresetOption,
    SeedOption,
    SimOption,
    atomically,
    find_plan,
    parse_arguments,
    print_table,
    shown,
)

app = typer.Typer(
    name="bcmi",
    help="Bragg coherent modulation imaging: simulate, measure, calibrate, reconstruct, compare.",
    epilog="Start with: bcmi demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


class Kind(StrEnum):
    """Kinds of simulated scan."""

    rocking = "rocking"
    ptychography = "ptychography"


class Method(StrEnum):
    """Ways to retrieve the phase."""

    bcmi = "bcmi"
    bcdi = "bcdi"
    published = "bcmi-paper"


class Likelihood(StrEnum):
    """Of counts: of their variance-stabilised square roots, or Poisson's."""

    anscombe = "anscombe"
    poisson = "poisson"


AGREED = 0.9
"""Weight of the first mode of the best trials below which they are not one solution."""

PUBLISHED_PASSES = 300
"""Of `Method.published`, where none are told: it goes slowly."""


class Format(StrEnum):
    """Files that other programs open."""

    cxi = "cxi"
    nexus = "nexus"
    id01 = "id01"


# -- the experiment --------------------------------------------------------------------------------------


@app.command()
def demo(
    preset: PresetOption = "small",
    out: Annotated[
        Path, typer.Option(help="Folder for report.html, figures, CXI files, summary.json.")
    ] = Path("bcmi-demo"),
    seed: SeedOption = 0,
) -> None:
    """Perform the whole experiment on the simulated beamline and compare with truth.

    Aligns the modulator, calibrates it by ptychography, rocks the crystal with the modulator in and out,
    reconstructs both and writes report.html. Everything goes over Channel Access, as on a real beamline.
    """
    from bcmi_beamline.demo import headline, run_demo

    with Display(announce=True) as display:
        summary = run_demo(preset, out, display.stage, seed)
    print_table(headline(summary), f"bcmi demo, preset {preset}")
    print(f"report: {out / 'report.html'}")


@app.command()
def ioc(
    preset: PresetOption = "small",
    prefix: Annotated[str | None, typer.Option(help="Instead of the configuration's prefix.")] = None,
    beamline: BeamlineOption = "sim-id01",
    data_dir: Annotated[Path, typer.Option(help="Where the Eiger writes its files.")] = Path("frames"),
    time_scale: Annotated[float | None, typer.Option(help="Wall seconds per beamline second.")] = None,
    list_pvs: Annotated[
        bool, typer.Option("--list-pvs", help="Print every process variable and stop.")
    ] = False,
) -> None:
    """Serve the simulated beamline over Channel Access until Ctrl-C."""
    from bcmi_beamline.sim.ioc.__main__ import main as serve

    arguments = ["--preset", preset, "--beamline", beamline, "--data-dir", str(data_dir)]
    arguments += ["--prefix", prefix] if prefix is not None else []
    arguments += ["--time-scale", str(time_scale)] if time_scale is not None else []
    raise typer.Exit(serve(arguments + (["--list-pvs"] if list_pvs else [])) or 0)


@app.command("dry-run")
def dry_run(
    plan: Annotated[str, typer.Argument(help="Name of a plan, e.g. rocking_scan.")],
    arguments: ArgumentsArgument = None,
    beamline: BeamlineOption = "sim-id01",
    directory: DirectoryOption = Path("bcmi-data"),
    picture: Annotated[Path | None, typer.Option(help="Draw the path of the motors into this PNG.")] = None,
    json_: JsonOption = False,
) -> None:
    """Tell duration, frames, disk, dose, limits, collisions of a plan; moves nothing, needs no beamline."""
    from bcmi_beamline.config import load_beamline
    from bcmi_beamline.plans import dry_run as rehearse

    function = find_plan(plan)
    folder = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.is_dir())
    outcome = rehearse(
        function,
        load_beamline(beamline),
        disk_free_bytes=shutil.disk_usage(folder).free,
        **parse_arguments(function, arguments or []),
    )
    if picture is not None:
        from bcmi_beamline.report.figures import path_figure

        atomically(picture, lambda beside: path_figure(outcome.path).savefig(beside))
    if json_:
        print(json.dumps(outcome.to_dict()))
    else:
        print_table(outcome.to_dict(), f"dry run of {function.__name__}")
    if outcome.problems:
        raise ValueError(f"{function.__name__}: {outcome.problems[0]}")


@app.command("run")
def run_plan(
    plan: Annotated[str, typer.Argument(help="Name of a plan, e.g. rocking_scan, or resume.")],
    arguments: ArgumentsArgument = None,
    beamline: BeamlineOption = "sim-id01",
    directory: DirectoryOption = Path("bcmi-data"),
    sim: SimOption = None,
) -> None:
    """Run one plan from a shell and print its result.

    "resume uid=UID" takes what an interrupted scan has left. "calibration=FILE.cxi" names the modulator that
    a rocking scan relies on.
    """
    if sim is not None:
        from bcmi_beamline.sim.launch import claim_ports

        claim_ports()  # libca reads its environment once, when the plans import ophyd
    pairs = {pair.partition("=")[0]: pair.partition("=")[2] for pair in arguments or []}
    file = pairs.pop("calibration", "") if pairs.get("calibration", "").endswith(".cxi") else ""
    resumes = plan == "resume"
    if resumes and set(pairs) != {"uid"}:
        raise ValueError("resume: give the run as uid=UID, and nothing else")
    function = None if resumes else find_plan(plan)
    values = parse_arguments(function, [f"{k}={v}" for k, v in pairs.items()]) if function else {}
    from bcmi_beamline.plans import dry_run as rehearse
    from bcmi_beamline.session import open_session

    with open_session(beamline, directory, simulate=sim) as session:
        if file:
            values["calibration"] = session.calibration(file)
        if function:
            session.disk.check(rehearse(function, session.beamline, **values).disk_bytes)
        with shown(plan) as progress:
            messages = function(session.devices, **values) if function else session.resume(pairs["uid"])
            result = session.run(messages, progress)
        session.flush()
    print(result)


# -- files in, files out ---------------------------------------------------------------------------------


@app.command()
def simulate(
    kind: Annotated[Kind, typer.Argument(help="rocking or ptychography.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The CXI file to write.")],
    preset: PresetOption = "small",
    beamline: BeamlineOption = "sim-id01",
    modulator: Annotated[bool, typer.Option(help="Rock with the modulator in, or out.")] = True,
    crystal: Annotated[
        Path | None, typer.Option(help="An own crystal: TOML, .npy, .npz or HDF5, instead of the preset's.")
    ] = None,
    truth: Annotated[
        Path | None, typer.Option(help="A CXI file for what was simulated: object, modulator, drift.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; by default one for each core.")
    ] = None,
) -> None:
    """Write frames from the physics alone, without Channel Access."""
    from bcmi_beamline import data
    from bcmi_beamline.config import load_beamline, load_crystal, load_preset
    from bcmi_beamline.truth import simulated_scan

    for path in (output, truth):
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"{path}: its folder does not exist: make the folder first")
    settings = load_preset(preset)
    if crystal is not None:
        sim = settings.sim.model_copy(update={"crystal": load_crystal(crystal)})
        settings = settings.model_copy(update={"sim": sim})
    with shown(f"Simulating {kind.value}") as progress:
        scan = simulated_scan(
            kind.value,
            load_beamline(beamline),
            settings,
            modulator,
            progress,
            workers or os.cpu_count() or 1,
            truth,
        )
        data.write_cxi(output, scan)
    print(f"{output}: {scan!r}")


@contextmanager
def _loaded(source: str, directory: Path) -> Iterator[Any]:
    """The scan behind a CXI path or a run uid; the catalogue is open only while it is read."""
    from bcmi_beamline import data

    if Path(source).suffix or Path(source).exists():
        yield data.load(Path(source))
        return
    with _catalog(directory) as catalog:
        yield data.load(source, catalog)


@contextmanager
def _catalog(directory: Path) -> Iterator[Any]:
    """The catalogue of a session's folder, or the one that ``BCMI_CATALOG`` names."""
    from bcmi_beamline import data

    folder = directory / "catalog"
    if not folder.is_dir() and not os.environ.get("BCMI_CATALOG"):
        raise ValueError(f"{directory} holds no catalogue; name the session's folder with --directory")
    with data.open_catalog(folder, readable=[Path("/")]) as catalog:  # on loopback, for this process alone
        yield catalog


@contextmanager
def _arriving(uid: str, directory: Path) -> Iterator[Iterator[Any]]:
    """The scan of a run, again and again while it runs; the catalogue is open as long as it is needed."""
    from bcmi_beamline import data

    with contextlib.ExitStack() as opened:
        log = data.DocumentLog(directory / "documents")
        yield data.watch(uid, lambda: opened.enter_context(_catalog(directory)), log)


def _picture(path: Path) -> Any:
    """Return a function that draws the object and the probe as they are into one picture, again and again."""

    def draw(transmission: Any, probe: Any, pixel: tuple[float, float]) -> None:
        import numpy as np
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 4), layout="constrained")
        values = np.angle(transmission), np.abs(transmission), np.abs(probe[0])
        for axes, image, title in zip(
            figure.subplots(1, 3), values, ("phase", "modulus", "beam"), strict=True
        ):
            ny, nx = image.shape
            axes.imshow(image, extent=(0, nx * pixel[1] * 1e6, 0, ny * pixel[0] * 1e6))
            axes.set(title=title, xlabel="um")
        atomically(path, lambda beside: figure.savefig(beside, dpi=80, format="png"))

    return draw


def _crystal_picture(path: Path) -> Any:
    """Return a function that draws a crystal as it is into one picture, again and again."""

    def draw(result: Any) -> None:
        from bcmi_beamline.report.figures import object_figure

        frames = result.configuration.get("frames")
        name = f"after {len(result.free_llk)} trial(s)" if frames is None else f"{frames} frames"
        figure = object_figure({name: result})
        atomically(path, lambda beside: figure.savefig(beside, dpi=80, format="png"))

    return draw


@app.command()
def calibrate(
    source: Annotated[str, typer.Argument(help="A CXI ptychography file, or a run uid.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The modulator file to write.")],
    refine_positions: Annotated[bool, typer.Option("--refine-positions/--keep-positions")] = True,
    refine_rotation: Annotated[bool, typer.Option(help="Seek the rotation of the stage.")] = False,
    modes: Annotated[int, typer.Option(min=1, max=4, help="Modes of the probe.")] = 1,
    iterations: Annotated[int, typer.Option(min=1, help="Passes over all frames, at most.")] = 60,
    patience: Annotated[
        int, typer.Option(min=0, help="Stop when the free error is flat over so many passes; 0: never.")
    ] = 2,
    from_crystal: Annotated[
        bool,
        typer.Option(
            "--from-crystal/--free-probe",
            help="Keep the beam to waves that left a small crystal at the distance d1.",
        ),
    ] = True,
    variations: Annotated[
        int, typer.Option(min=0, max=4, help="Ways in which the probe may change during the scan.")
    ] = 0,
    background: Annotated[bool, typer.Option(help="Fit counts that no wave makes.")] = False,
    search_radius: Annotated[
        float, typer.Option(min=0, help="Pixels; also try other positions at random.")
    ] = 0.0,
    resolution: Annotated[bool, typer.Option(help="Also compare two half scans.")] = False,
    device: Annotated[str, typer.Option(help="numpy, torch, torch:cpu, torch:cuda or cupy.")] = "numpy",
    live: Annotated[
        bool, typer.Option(help="Take the frames of a run as they come; the picture lies beside OUTPUT.")
    ] = False,
    seed: SeedOption = 0,
    directory: DirectoryOption = Path("bcmi-data"),
) -> None:
    """Ptychography: the modulator's transmission, the beam on it, and the distance d1."""
    from bcmi_beamline import data
    from bcmi_beamline.reconstruction.ptychography import calibrate as engine
    from bcmi_beamline.scans import PtychographyScan

    def checked(scan: Any) -> PtychographyScan:
        if not isinstance(scan, PtychographyScan):
            raise ValueError(f"{source}: holds a rocking scan; calibrate needs a ptychography scan")
        return scan

    with contextlib.ExitStack() as opened:
        if live:
            scan = map(checked, opened.enter_context(_arriving(source, directory)))
        else:
            scan = checked(opened.enter_context(_loaded(source, directory)))
        progress = opened.enter_context(shown("Calibrating the modulator"))
        modulator = engine(
            scan,
            iterations=iterations,
            patience=patience,
            modes=modes,
            from_crystal=from_crystal,
            variations=variations,
            background=background,
            refine_positions=refine_positions,
            refine_rotation=refine_rotation,
            search_radius=search_radius,
            resolution=resolution,
            device=device,
            seed=seed,
            progress=progress,
            show=_picture(output.with_suffix(".png")) if live else None,
        )
    data.write_modulator(output, modulator)
    print(f"{output}: {modulator!r}")


@app.command()
def reconstruct(
    source: Annotated[str, typer.Argument(help="A CXI rocking file, or a run uid.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The result file to write.")],
    modulator: Annotated[
        Path | None, typer.Option(help="The calibrated modulator; makes bcmi the method.")
    ] = None,
    method: Annotated[
        Method | None,
        typer.Option(help="bcmi where a modulator is given, else bcdi; bcmi-paper: the published iteration."),
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="Independent random starts.")] = 5,
    seed: SeedOption = 0,
    iterations: Annotated[
        int | None, typer.Option(min=1, help="Of each trial; the engine's own choice if absent.")
    ] = None,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes that share the trials, or jobs of a SLURM cluster.")
    ] = 1,
    scheduler: Annotated[
        str | None, typer.Option(help="Run the trials there: a Dask address (tcp://host:8786), or slurm.")
    ] = None,
    keep: Annotated[
        Path | None, typer.Option(help="Folder that keeps finished trials; the same command then resumes.")
    ] = None,
    live: Annotated[bool, typer.Option(help="After each trial, draw what there is into OUTPUT.png.")] = False,
    follow: Annotated[
        bool,
        typer.Option(help="bcmi: take the frames of a run as they come, draw the crystal as it grows."),
    ] = False,
    preview: Annotated[
        int, typer.Option(min=3, help="--follow: frames solved when the crystal is first drawn.")
    ] = 33,
    refine_scale: Annotated[
        bool,
        typer.Option(
            "--refine-scale", help="bcmi: let the frames correct the scale of the modulator's map, and of d1."
        ),
    ] = False,
    refine_distance: Annotated[
        bool,
        typer.Option(
            "--refine-distance", help="bcmi: find d1 where the crystal is most even; for one density only."
        ),
    ] = False,
    support: Annotated[
        Path | None,
        typer.Option(help="A result file whose support is taken as known; in bcmi it may shrink."),
    ] = None,
    generations: Annotated[
        int, typer.Option(min=1, help="bcdi: guided search; trials are crossed with the best so often.")
    ] = 1,
    likelihood: Annotated[
        Likelihood,
        typer.Option(
            help="bcmi: what the last two passes maximise; poisson helps a little where counts are few."
        ),
    ] = Likelihood.anscombe,
    coherence: Annotated[bool, typer.Option(help="Fit how coherent the light was.")] = False,
    directory: DirectoryOption = Path("bcmi-data"),
) -> None:
    """Phase retrieval of a rocking scan: a 3D complex image of the crystal."""
    from bcmi_beamline import data
    from bcmi_beamline.reconstruction.crystal_frame import crystal_frame
    from bcmi_beamline.scans import RockingScan

    chosen = method or (Method.bcmi if modulator else Method.bcdi)
    if chosen is not Method.bcdi and modulator is None:
        raise ValueError(f"{chosen.value} needs --modulator FILE; bcmi calibrate makes one")
    if chosen is not Method.bcdi and generations > 1:
        raise ValueError("--generations belongs to bcdi; leave it or --modulator")
    if follow and (support is not None or coherence):
        raise ValueError("--support and --coherence are for a finished scan: leave --follow")
    refined = refine_scale or refine_distance
    if chosen is Method.published and coherence:
        raise ValueError("--coherence belongs to bcmi and bcdi: leave it or --method bcmi-paper")
    polished = likelihood is not Likelihood.anscombe
    if (refined or polished) and (follow or chosen is not Method.bcmi):
        raise ValueError(
            "--refine-scale, --refine-distance and --likelihood are for bcmi on a finished scan: give "
            "--modulator, leave --follow or --method"
        )
    if follow:
        if chosen is not Method.bcmi or modulator is None:
            raise ValueError("--follow is for bcmi: give --modulator FILE")
        options = {"seed": seed, "preview": preview}
        options |= {} if iterations is None else {"iterations": iterations}
        _follow(source, output, modulator, directory, options)
        return
    with _loaded(source, directory) as scan:
        if not isinstance(scan, RockingScan):
            raise ValueError(f"{source}: holds a ptychography scan; reconstruct needs a rocking scan")
    options: dict[str, Any] = {"trials": trials, "seed": seed}
    options |= {"workers": workers, "scheduler": scheduler, "folder": keep}
    options |= {} if iterations is None else {"iterations": iterations}
    options["show"] = _crystal_picture(output.with_suffix(".png")) if live else None
    options["support"] = data.read_reconstruction(support) if support is not None else None
    with shown(f"Reconstructing ({chosen.value})") as progress:
        if modulator is not None and chosen is not Method.bcdi:
            from bcmi_beamline.reconstruction import modulation

            known = data.read_modulator(modulator)
            if chosen is Method.published:
                options = {"iterations": PUBLISHED_PASSES} | options | {"method": "paper"}
            else:
                options |= {"refine_scale": refine_scale, "refine_distance": refine_distance}
                options |= {"coherence": coherence, "likelihood": likelihood.value}
            result = modulation.reconstruct(scan, known, progress=progress, **options)
        else:
            from bcmi_beamline.reconstruction import conventional

            recipe = conventional.Recipe(generations=generations, partial_coherence=coherence)
            result = conventional.reconstruct(scan, progress=progress, recipe=recipe, **options)
    data.write_reconstruction(output, result, crystal_frame(result))
    print(f"{output}: {result!r}")
    _judge(result)


def _judge(result: Any) -> None:
    """Tell what a reconstruction says of itself, and that its trials disagree where they do."""
    best = min(result.metadata.get("trial_scores") or result.free_llk[:, -1])
    noise, weights = result.metadata.get("noise_score"), result.mode_weights
    beside = "" if noise is None else f"; counting noise alone would leave {noise:.3f}"
    print(f"free log-likelihood {best:.3f}{beside}")
    if weights is not None and len(weights) > 1:
        print(f"the best {len(weights)} trials have {100 * weights[0]:.1f} % in common")
        if weights[0] < AGREED:
            hint = (
                ": do these frames belong to this modulator?" if noise is not None else ": try more of them"
            )
            print(f"bcmi: the best trials disagree{hint}", file=sys.stderr)


def _follow(source: str, output: Path, modulator: Path, directory: Path, options: dict[str, Any]) -> None:
    """Reconstruct a run while it is taken; Ctrl-C leaves what was last drawn."""
    from bcmi_beamline import data
    from bcmi_beamline.reconstruction import modulation
    from bcmi_beamline.reconstruction.crystal_frame import crystal_frame
    from bcmi_beamline.scans import RockingScan

    known, latest, draw = data.read_modulator(modulator), [], _crystal_picture(output.with_suffix(".png"))

    def show(result: Any) -> None:
        latest[:] = [result]
        draw(result)

    def rocking(scan: Any) -> RockingScan:
        if not isinstance(scan, RockingScan):
            raise ValueError(f"{source}: holds a ptychography scan; reconstruct needs a rocking scan")
        return scan

    try:
        with contextlib.ExitStack() as opened:
            if Path(source).suffix or Path(source).exists():
                scans = iter([opened.enter_context(_loaded(source, directory))])
            else:
                scans = opened.enter_context(_arriving(source, directory))
            progress = opened.enter_context(shown("Following the scan"))
            arriving = map(rocking, scans)
            modulation.follow(arriving, known, progress=progress, show=show, **options)
    except BaseException as stopped:
        if latest:
            data.write_reconstruction(output, latest[0], crystal_frame(latest[0]))
        if isinstance(stopped, KeyboardInterrupt):
            kept = f"{output} holds the crystal as drawn last" if latest else "no crystal was drawn yet"
            print(f"bcmi: interrupted: {kept}", file=sys.stderr)
        raise
    data.write_reconstruction(output, latest[0], crystal_frame(latest[0]))
    print(f"{output}: {latest[0]!r}")
    _judge(latest[0])


@app.command()
def compare(
    result: Annotated[Path, typer.Argument(help="A result file.")],
    truth: Annotated[Path, typer.Argument(help="The file to compare with.")],
    json_: JsonOption = False,
) -> None:
    """Correlation, class and resolution of a result after the trivial ambiguities are removed."""
    from bcmi_beamline import data
    from bcmi_beamline.reconstruction.metrics import compare as measure

    found = measure(data.read_reconstruction(result), data.read_reconstruction(truth)).to_json()
    if json_:
        print(json.dumps(found))
    else:
        print_table(found, f"{result} against {truth}")


@app.command()
def export(
    run_uid: Annotated[str, typer.Argument(help="Run to export.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The file to write.")],
    format: Annotated[Format, typer.Option(help="cxi, nexus or id01.")] = Format.cxi,
    directory: DirectoryOption = Path("bcmi-data"),
) -> None:
    """Write one run into a file that other programs open."""
    from bcmi_beamline import data

    with _catalog(directory) as catalog:
        data.export(catalog.run(run_uid), output, format=format.value)
    print(output)


@app.command()
def serve(
    directory: DirectoryOption = Path("bcmi-data"),
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8000,
    readable: Annotated[
        list[Path] | None, typer.Option(help="A folder that detectors write into; may be repeated.")
    ] = None,
    users: Annotated[
        Path | None, typer.Option(help="Tiled configuration of how users log in; else one user and a key.")
    ] = None,
) -> None:
    """Serve the catalogue of a session's folder to others until Ctrl-C."""
    from bcmi_beamline.data._commands import serve_catalog

    say = functools.partial(print, flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        serve_catalog(directory, say, host=host, port=port, readable=readable or (), users=users)


@app.command()
def replay(
    runs: Annotated[
        list[str] | None, typer.Argument(help="Uids, or their beginnings; all if absent.")
    ] = None,
    directory: DirectoryOption = Path("bcmi-data"),
) -> None:
    """Store the logged runs that the catalogue does not hold whole; each is stored exactly once."""
    from bcmi_beamline.data._commands import replay_runs

    stored, problems = replay_runs(directory, runs or [], print)
    for problem in problems:
        print(f"bcmi: {problem}", file=sys.stderr)
    print(f"{stored} stored")
    raise typer.Exit(2 if problems else 0)


@app.command()
def report(
    results: Annotated[list[Path], typer.Argument(help="Result files.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The page to write.")],
    modulator: Annotated[Path | None, typer.Option(help="A calibrated modulator to show.")] = None,
    truth: Annotated[Path | None, typer.Option(help="A truth file to compare with.")] = None,
) -> None:
    """Draw results into one self-contained page."""
    from bcmi_beamline import data
    from bcmi_beamline.report import results_page

    found = {path.stem: data.read_reconstruction(path) for path in results}
    calibrated = data.read_modulator(modulator) if modulator else None
    known = data.read_reconstruction(truth) if truth else None
    atomically(output, lambda beside: results_page(beside, found, calibrated, known))
    print(output)


@app.command()
def monitor(
    directory: DirectoryOption = Path("bcmi-data"),
    port: Annotated[int, typer.Option(help="Of the page on this machine; 0 takes a free one.")] = 8123,
) -> None:
    """Serve a live web page of the runs in a session's folder until Ctrl-C."""
    from bcmi_beamline.monitor import make_server

    try:
        server = make_server(directory, port)
    except OSError as error:
        raise ValueError(f"port {port}: {error.strerror}; choose another with --port") from None
    print(f"watching {directory}: http://127.0.0.1:{server.server_port}/  (Ctrl-C stops)", flush=True)
    with server:
        server.serve_forever()


beamline_commands.register(app)


def _explain(error: BaseException) -> str:
    """The first line that a person can act on."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def main() -> None:
    """Entry point: errors become one line, interruption leaves with 130."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if not os.environ.get("BCMI_TRACEBACK"):
        logging.getLogger("bluesky").setLevel(logging.CRITICAL)  # a failed plan ends as one line, below
    try:
        app()
    except KeyboardInterrupt:
        print("bcmi: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if os.environ.get("BCMI_TRACEBACK"):
            raise
        print(f"bcmi: {_explain(error)}", file=sys.stderr)
        sys.exit(130 if type(error).__name__ == "PlanInterrupted" else 2)


if __name__ == "__main__":
    main()
