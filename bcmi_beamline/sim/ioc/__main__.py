"""``python -m bcmi_beamline.sim.ioc``: serve the simulated beamline over Channel Access."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from bcmi_beamline.config import Beamline, ConfigError, Preset, load_beamline, load_preset

if TYPE_CHECKING:
    from bcmi_beamline.sim.ioc.beamline import SimulatedBeamlineIOC


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bcmi_beamline.sim.ioc",
        description="Serve the simulated beamline over Channel Access until SIGINT or SIGTERM. Answers on "
        "EPICS_CAS_INTF_ADDR_LIST, by default on this machine only.",
    )
    parser.add_argument("--preset", default="small", help="experiment preset: a name or a .toml file")
    parser.add_argument("--beamline", default="sim-id01", help="configuration: a name or a .toml file")
    parser.add_argument("--prefix", help="instead of the configuration's prefix")
    parser.add_argument("--data-dir", type=Path, default=Path("frames"), help="where the Eiger writes")
    parser.add_argument("--time-scale", type=float, help="wall seconds per beamline second")
    parser.add_argument("--list-pvs", action="store_true", help="print every process variable and stop")
    parser.add_argument("--parent", type=int, metavar="PID", help="stop when this parent process is gone")
    return parser


Model = TypeVar("Model", Beamline, Preset)


def _load(source: str, load: Callable[[str], Model], model: type[Model]) -> Model:
    """Read a configuration; a ``.json`` file is one that the launcher has checked and handed over."""
    return model.model_validate_json(Path(source).read_bytes()) if source.endswith(".json") else load(source)


async def _run(ioc: SimulatedBeamlineIOC, parent: int | None) -> None:
    from bcmi_beamline.sim.ioc.server import serve
    from bcmi_beamline.sim.ioc.status import show_status

    interfaces = None if os.environ.get("EPICS_CAS_INTF_ADDR_LIST") else ["127.0.0.1"]
    try:
        await ioc.initialise()
        status = asyncio.create_task(show_status(ioc))
        await serve(ioc.pvdb, interfaces, parent)
        status.cancel()
    finally:
        await ioc.close()


def _prepare(options: argparse.Namespace) -> SimulatedBeamlineIOC:
    """Build the IOC, while the process that makes its frames starts.

    Raises
    ------
    ValueError, OSError
        One line: what cannot be used.
    """
    os.environ["OPHYD_CONTROL_LAYER"] = "dummy"  # its names are wanted, no Channel Access client
    from bcmi_beamline.sim.ioc.camera import Camera

    preset = _load(options.preset, load_preset, Preset)
    beamline = _load(options.beamline, load_beamline, Beamline)
    if options.prefix is not None:
        beamline = beamline.model_copy(update={"prefix": options.prefix})
    scale = preset.sim.time_scale if options.time_scale is None else options.time_scale
    if not 0 < scale < float("inf"):
        raise ConfigError(f"--time-scale must be positive, not {scale}")
    data_dir = options.data_dir.absolute()
    data_dir.mkdir(parents=True, exist_ok=True)
    camera = Camera(beamline, preset)
    if not options.list_pvs:
        camera.launch()
    from bcmi_beamline.sim.ioc.beamline import SimulatedBeamlineIOC

    return SimulatedBeamlineIOC(beamline, camera, data_dir, scale)


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until told to stop; returns the exit status."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("caproto").setLevel(logging.ERROR)  # it warns of every batch of updates
    os.environ.setdefault("EPICS_CAS_AUTO_BEACON_ADDR_LIST", "NO")
    try:
        ioc = _prepare(options)
    except (ValueError, OSError) as error:
        print(f"bcmi ioc: {error}", file=sys.stderr)
        return 2
    if options.list_pvs:
        print("\n".join(ioc.pvdb))
        return 0
    try:
        asyncio.run(_run(ioc, options.parent))
    except KeyboardInterrupt:  # before it served
        return 130
    except (ValueError, RuntimeError, OSError) as error:
        print(f"bcmi ioc: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
