"""Commands of ``bcmi`` for the days at the beamline: the prompt, the queue, rehearsals, a first look."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from bcmi_beamline.cli_parts import (
    ArgumentsArgument,
    BeamlineOption,
    DirectoryOption,
    JsonOption,
    SimOption,
    find_plan,
    parse_arguments,
    print_table,
    shown,
)

ProfileOption = Annotated[
    Path | None, typer.Option(help="A profile collection; the one beside the package if absent.")
]

queue_app = typer.Typer(
    name="queue",
    help="Queue plans through bluesky-queueserver: serve, submit, start, watch, stop.",
    no_args_is_help=True,
)


def register(app: typer.Typer) -> None:
    """Add these commands to `app`."""
    for command in (shell, check, rehearse):
        app.command()(command)
    app.add_typer(queue_app)


def _profile(given: Path | None) -> Path:
    """A profile collection with startup files."""
    import bcmi_beamline

    profile = given or Path(bcmi_beamline.__file__).parents[1] / "profile_collection"
    if not (profile / "startup").is_dir():
        raise ValueError(f"{profile} holds no startup folder; name a profile collection with --profile")
    return profile.absolute()


def shell(
    beamline: BeamlineOption = "sim-id01",
    directory: DirectoryOption = Path("bcmi-data"),
    sim: SimOption = None,
    profile: ProfileOption = None,
) -> None:
    """Open IPython with RE, the devices, every plan, the catalogue, live tables and plots."""
    os.environ |= {"BCMI_BEAMLINE": str(beamline), "BCMI_DIRECTORY": str(directory.absolute())}
    if sim is not None:
        os.environ["BCMI_SIM"] = sim
    from IPython.terminal.ipapp import TerminalIPythonApp

    prompt = TerminalIPythonApp.instance()
    prompt.initialize(["--profile-dir", str(_profile(profile)), "--no-banner"])
    raise typer.Exit(prompt.start() or 0)


def check(
    beamline: BeamlineOption = "sim-id01",
    sim: SimOption = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for answers.")] = 5.0,
    json_: JsonOption = False,
) -> None:
    """Connect to everything a configuration names and tell what answers and what is unexpected.

    Reads only: nothing is written and nothing moves. Exit status 1 when anything is silent or differs.
    """
    import tempfile
    from contextlib import ExitStack

    from bcmi_beamline.config import load_beamline

    known = load_beamline(beamline)
    with ExitStack() as stack:
        if sim is not None:
            from bcmi_beamline.session import hush_channel_access
            from bcmi_beamline.sim.launch import SimulatedBeamline

            folder = stack.enter_context(tempfile.TemporaryDirectory())
            stack.enter_context(SimulatedBeamline(sim, known, data_dir=folder))
            stack.callback(hush_channel_access)
        from bcmi_beamline.devices import make_devices
        from bcmi_beamline.devices.check import check_devices

        findings = check_devices(make_devices(known), timeout)
    _show_findings(findings, known.name, json_)
    raise typer.Exit(int(any(finding.verdict != "ok" for finding in findings)))


def _show_findings(findings: list[Any], name: str, as_json: bool) -> None:
    from dataclasses import asdict

    if as_json:
        print(json.dumps([asdict(finding) for finding in findings]))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("device", "process variable", "reads", "", title=name, title_justify="left")
    for finding in findings:
        colour = {"ok": "green", "differs": "yellow", "silent": "red"}[finding.verdict]
        remarks = "; ".join(finding.remarks) or finding.verdict
        table.add_row(finding.device, finding.pv, finding.value, f"[{colour}]{remarks}")
    Console(emoji=False).print(table)  # a process variable like ring:current is no picture of one
    wrong = {v: sum(f.verdict == v for f in findings) for v in ("silent", "differs")}
    print(f"{len(findings)} looked at, {wrong['silent']} silent, {wrong['differs']} unexpected")


def rehearse(
    file: Annotated[Path, typer.Argument(help="A Python file of plans that take devices first.")],
    arguments: ArgumentsArgument = None,
    plan: Annotated[str | None, typer.Option(help="Only this plan of the file.")] = None,
    beamline: BeamlineOption = "sim-id01",
    sim: Annotated[str, typer.Option("--sim", help="Preset of the simulated experiment.")] = "small",
    time_scale: Annotated[
        float, typer.Option(min=0, help="Wall seconds per second of exposure and motion.")
    ] = 0.002,
    directory: Annotated[
        Path | None, typer.Option(help="Keep frames and documents here; else they are thrown away.")
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Try a plan file before the night: dry run, then all of it on the simulated beamline.

    Checks limits, collisions, time and disk, runs what passes over Channel Access without a screen, and
    validates every document. Exit status 0 when every plan may go to the beamline, 1 when one may not.
    """
    from bcmi_beamline.sim.launch import claim_ports

    claim_ports()  # libca reads its environment once, when the file imports ophyd
    from bcmi_beamline.config import load_beamline
    from bcmi_beamline.rehearsal import plans_of_file
    from bcmi_beamline.rehearsal import rehearse as try_plans

    plans = plans_of_file(file)
    if plan is not None and plan not in plans:
        raise ValueError(f"{file}: defines no plan {plan!r}; it has {', '.join(plans)}")
    chosen = plans if plan is None else {plan: plans[plan]}
    values: dict[str, Any] = {}
    for function in chosen.values():
        values = parse_arguments(function, arguments or [])
    with shown(f"Rehearsing {file.name}") as progress:
        reports = try_plans(
            chosen,
            load_beamline(beamline),
            simulate=sim,
            arguments=values,
            time_scale=time_scale,
            directory=directory,
            progress=progress,
        )
    if json_:
        print(json.dumps([report.to_dict() for report in reports]))
    else:
        for report in reports:
            _show_report(report)
    raise typer.Exit(int(not all(report.passed for report in reports)))


def _show_report(report: Any) -> None:
    dry = report.dry_run
    planned = f"{dry['frames']} frames, {dry['duration_s']:.0f} s, {dry['disk_mb']:.0f} MB"
    done = f"{report.frames} frames in {report.runs} runs, {report.documents} documents"
    rows = {"planned": planned, "on the simulated beamline": done if report.runs else "not tried"}
    rows |= {f"problem {i}": problem for i, problem in enumerate(report.problems, 1)}
    print_table(rows, f"{report.plan}: {'passed' if report.passed else 'FAILED'}")


# -- the queue -------------------------------------------------------------------------------------------


@contextmanager
def _client(directory: Path) -> Iterator[Any]:
    from bcmi_beamline.queue import QueueClient

    with QueueClient(directory) as client:
        yield client


@queue_app.command("serve")
def queue_serve(
    beamline: BeamlineOption = "sim-id01",
    directory: DirectoryOption = Path("bcmi-data"),
    sim: SimOption = None,
    profile: ProfileOption = None,
    time_scale: Annotated[float | None, typer.Option(help="Wall seconds per beamline second.")] = None,
) -> None:
    """Bring up Redis, the queue's manager and, with --sim, the simulated beamline; until Ctrl-C."""
    from bcmi_beamline.queue import QueueClient, QueueService

    startup = _profile(profile) / "startup"
    with QueueService(directory, startup, beamline=beamline, simulate=sim, time_scale=time_scale) as service:
        print(f"queue manager: up, log in {service.log}")
        print(f"Redis: {service.redis}")
        print(f"beamline: {beamline if sim is None else f'simulated, preset {sim}'}", flush=True)
        with QueueClient(directory) as client:
            client.open()
        print("worker: session open")
        print(f"now, in another terminal: bcmi queue submit find_bragg_peak --directory {directory}")
        print("Ctrl-C stops all of it", flush=True)
        asked: list[int] = []
        for number in (signal.SIGINT, signal.SIGTERM):
            # an impatient second one must not break off the stopping
            signal.signal(number, lambda number, _frame: asked.append(number))
        while not asked:
            time.sleep(0.2)
        print("stopping: a running plan is aborted, the hardware left safe", file=sys.stderr, flush=True)


@queue_app.command("submit")
def queue_submit(
    plan: Annotated[str, typer.Argument(help="Name of a plan, e.g. rocking_scan.")],
    arguments: ArgumentsArgument = None,
    directory: DirectoryOption = Path("bcmi-data"),
    first: Annotated[bool, typer.Option("--first", help="Before all that waits.")] = False,
    start: Annotated[bool, typer.Option(help="Start the queue where it rests.")] = True,
) -> None:
    """Put one plan into the queue and start the queue."""
    function = find_plan(plan)
    values = parse_arguments(function, arguments or [])
    with _client(directory) as client:
        uid = client.submit(function.__name__, values, first=first)
        if start and client.status()["manager_state"] == "idle":
            client.start()
        print(f"queued {function.__name__} ({uid[:8]})")


@queue_app.command("status")
def queue_status(directory: DirectoryOption = Path("bcmi-data"), json_: JsonOption = False) -> None:
    """Tell what runs, what waits, and how the last plans ended."""
    with _client(directory) as client:
        state = client.status()
        running, waiting = client.items()
        ended = client.history()[-5:]
    if json_:
        print(json.dumps({"status": state, "running": running, "waiting": waiting, "ended": ended}))
        return
    rows = {
        "manager": state["manager_state"],
        "worker": state["worker_environment_state"],
        "running": _item(running) if running else "-",
    }
    rows |= {f"waiting {i}": _item(item) for i, item in enumerate(waiting, 1)}
    for item in ended:
        result = item["result"]
        rows[f"ended {item['item_uid'][:8]}"] = (
            f"{_item(item)}: {result['exit_status']} {_last(result['msg'])}"
        )
    print_table(rows, "queue")


def _item(item: dict[str, Any]) -> str:
    words = [f"{key}={value}" for key, value in item.get("kwargs", {}).items()]
    return " ".join([item["name"], *words])


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


@queue_app.command("watch")
def queue_watch(directory: DirectoryOption = Path("bcmi-data")) -> None:
    """Show what the worker prints until the queue rests; exit status 1 when the last plan failed."""
    with _client(directory) as client:
        last = client.wait(lambda line: print(line, flush=True))
    if not last:
        raise ValueError("nothing has run in this queue yet; submit a plan with: bcmi queue submit PLAN")
    result = last["result"]
    print(f"{_item(last)}: {result['exit_status']} {_last(result['msg'])}".rstrip())
    raise typer.Exit(int(result["exit_status"] != "completed"))


@queue_app.command("start")
def queue_start(directory: DirectoryOption = Path("bcmi-data")) -> None:
    """Run what waits in the queue."""
    with _client(directory) as client:
        client.start()


@queue_app.command("stop")
def queue_stop(
    directory: DirectoryOption = Path("bcmi-data"),
    now: Annotated[bool, typer.Option("--now", help="Abort the running plan, leaving all safe.")] = False,
) -> None:
    """Start no other plan after the running one; with --now abort that, too."""
    with _client(directory) as client:
        if now:
            client.abort()
        else:
            client.stop()


@queue_app.command("clear")
def queue_clear(directory: DirectoryOption = Path("bcmi-data")) -> None:
    """Take every waiting plan out of the queue."""
    with _client(directory) as client:
        client.clear()


@queue_app.command("recover")
def queue_recover(directory: DirectoryOption = Path("bcmi-data")) -> None:
    """Replace a worker that died or hangs, close the shutter and disarm; the queue is kept."""
    with _client(directory) as client:
        client.recover()
    print("worker: session open; shutter closed, motors stopped, detector disarmed")


@queue_app.command("results")
def queue_results(directory: DirectoryOption = Path("bcmi-data")) -> None:
    """Print what each plan found when it last succeeded, as JSON."""
    with _client(directory) as client:
        print(json.dumps(client.results(), indent=1))
