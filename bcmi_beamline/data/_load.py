"""From a run to a scan: the window around the beam, bad pixels found, angles and positions in place."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote, urlparse

import h5py
import hdf5plugin  # noqa: F401  registers the bitshuffle-LZ4 filter
import numpy as np

from bcmi_beamline.data._clean import FrameSource, KeptFrames, clean_frames, mask_frames
from bcmi_beamline.data._hdf5 import FileError, Reader, file_error, open_hdf5
from bcmi_beamline.data.catalog import Catalog
from bcmi_beamline.data.cxi import read_cxi, write_cxi
from bcmi_beamline.data.eiger_files import is_eiger_master, read_master
from bcmi_beamline.data.id01 import find_scan, read_scan, write_id01
from bcmi_beamline.data.nexus import write_nexus
from bcmi_beamline.geometry import Geometry
from bcmi_beamline.scans import PtychographyScan, RockingScan

Scan = RockingScan | PtychographyScan

IMAGE = "eiger_image"
SENTINEL = "sentinel"
"""1 in the events of frames that belong to no point of the scan."""
PIXEL_MASK = "/entry/instrument/detector/detectorSpecific/pixel_mask"


# -- where frames come from -------------------------------------------------------------------------
class _LocalFrames:
    """Frames in the detector's own files, in their order."""

    def __init__(self, files: list[Path], dataset: str) -> None:
        self._files, self._dataset = files, dataset
        lengths = []
        for path in files:
            with self._open(path) as frames:
                lengths.append(frames.shape[0])
                self.dtype = frames.dtype
        self.length = sum(lengths)
        self._file_of = np.repeat(np.arange(len(files)), lengths)
        self._row_of = np.concatenate([np.arange(n) for n in lengths]) if lengths else np.empty(0, int)

    @contextlib.contextmanager
    def _open(self, path: Path) -> Iterator[h5py.Dataset]:
        try:
            with open_hdf5(path) as file:
                frames = file.get(self._dataset)
                if not isinstance(frames, h5py.Dataset) or frames.ndim != 3 or frames.dtype.kind != "u":
                    raise file_error(path, self._dataset, "holds no frames", "restore the detector's files")
                yield frames
        except OSError as error:
            raise file_error(path, self._dataset, f"cannot be read ({error})", "restore the file") from None

    def read(self, wanted: np.ndarray, cut: tuple[slice, slice]) -> np.ndarray:
        out = np.empty((len(wanted), cut[0].stop - cut[0].start, cut[1].stop - cut[1].start), self.dtype)
        for number in np.unique(self._file_of[wanted]):
            with self._open(self._files[number]) as frames:
                for place in np.flatnonzero(self._file_of[wanted] == number):
                    out[place] = frames[(self._row_of[wanted[place]], *cut)]
        return out


class _ServedFrames:
    """Frames that only the server can reach; it cuts out the window."""

    def __init__(self, image: Any) -> None:
        self._image = image
        self.length, self.dtype = image.shape[0], np.dtype(image.dtype)

    def read(self, wanted: np.ndarray, cut: tuple[slice, slice]) -> np.ndarray:
        if not len(wanted):
            return np.empty((0, cut[0].stop - cut[0].start, cut[1].stop - cut[1].start), self.dtype)
        first = int(wanted[0])
        block = self._image[(slice(first, int(wanted[-1]) + 1), *cut)]
        return np.asarray(block)[wanted - first]


class _WindowFrames:
    """Rows `wanted` of a source, cut to a window."""

    def __init__(
        self, source: _LocalFrames | _ServedFrames, wanted: np.ndarray, cut: tuple[slice, slice]
    ) -> None:
        self._source, self._wanted, self._cut = source, wanted, cut
        self.dtype = source.dtype
        self.shape = (len(wanted), cut[0].stop - cut[0].start, cut[1].stop - cut[1].start)

    def __getitem__(self, key: slice, /) -> np.ndarray:
        return self._source.read(self._wanted[key], self._cut)


class _JoinedFrames:
    """Frames of an interrupted run and of the one that completes it."""

    def __init__(self, first: FrameSource, second: FrameSource) -> None:
        self._first, self._second = first, second
        self.dtype = first.dtype
        self.shape = (first.shape[0] + second.shape[0], *first.shape[1:])

    def __getitem__(self, key: slice, /) -> np.ndarray:
        begin, stop, _ = key.indices(self.shape[0])
        count = self._first.shape[0]
        parts = [self._first[min(begin, count) : min(stop, count)]]
        parts.append(self._second[max(begin - count, 0) : max(stop - count, 0)])
        return np.concatenate(parts)


# -- runs -------------------------------------------------------------------------------------------
class _Run:
    """One run as the catalogue gives it, asked for what a scan needs.

    A run that ``continues`` another brings the points of that one along, first. Events marked ``sentinel``
    are no points; with `sentinels` they are what is looked at.
    """

    def __init__(self, client: Any, sentinels: bool = False) -> None:
        try:
            self.start: dict[str, Any] = client.metadata["start"]
            self._stop = client.metadata.get("stop") or {}
        except (AttributeError, KeyError, TypeError):
            raise ValueError(
                f"{client!r} is no run; give a CXI file, a run of the catalogue, or a uid and the catalogue"
            ) from None
        self.name = f"run {self.start['uid'][:8]}"
        self.kind = self.get("scan_kind")
        if self.kind not in ("rocking", "ptychography"):
            raise self.fail(
                "start document", f"scan_kind is {self.kind!r}", "name a rocking or ptychography run"
            )
        axes = ["nanogoniometer_x", "nanogoniometer_y"]
        self._axes = [f"diffractometer_{self.get('rocking', 'circle')}"] if self.kind == "rocking" else axes
        if "primary" not in client:
            raise self.fail("primary", "has no points", "take the scan again")
        self._stream = client["primary"]
        present = set(self._stream)
        if IMAGE not in present:
            raise self.fail("primary", f"has no {IMAGE}", "name a scan that used the detector")
        wanted = [*self._axes, "eiger_frame", "monitor_flux", SENTINEL]
        readings = self._stream.read([key for key in wanted if key in present])
        self._readings = {key: np.asarray(readings[key].values) for key in wanted if key in present}
        events = len(self._readings.get(self._axes[0], ()))
        self._marked = self._readings.pop(SENTINEL, np.zeros(events)) != 0
        kept = self._marked == sentinels
        self._readings = {key: values[kept] for key, values in self._readings.items()}
        self._earlier = self._continued(client, sentinels)
        self._sentinels = sentinels

    def _continued(self, client: Any, sentinels: bool) -> _Run | None:
        """Return the run that this one completes."""
        uid = self.start.get("continues")
        if uid is None:
            return None
        try:
            earlier = _Run(client.parent[uid], sentinels)
        except KeyError:
            raise self.fail(
                "start document",
                f"continues run {uid[:8]}, which is not here",
                "restore it from its document log",
            ) from None
        for key in ("scan_kind", "rocking", "window", "modulator"):
            if earlier.start.get(key) != self.start.get(key):
                raise self.fail(
                    "start document", f"{key} is not that of {earlier.name}", "load them one by one"
                )
        return earlier

    def fail(self, where: str, wrong: str, mend: str) -> FileError:
        return file_error(self.name, where, wrong, mend)

    def get(self, key: str, *parts: str) -> Any:
        """Return part of the start document."""
        value = self.start
        for part in (key, *parts):
            if not isinstance(value, dict) or part not in value:
                where = ".".join((key, *parts))
                raise self.fail(
                    "start document", f"has no {where}", "take the scan with this package's plans"
                )
            value = value[part]
        return value

    def column(self, key: str) -> np.ndarray:
        """Return one reading per point."""
        own = self._own(key)
        return own if self._earlier is None else np.concatenate([self._earlier.column(key), own])

    def _own(self, key: str) -> np.ndarray:
        if key not in self._readings:
            raise self.fail("primary", f"has no {key}", "record it with the scan")
        values = self._readings[key]
        if values.dtype.kind not in "iuf" or not np.isfinite(values).all():
            raise self.fail("primary", f"{key} holds values that are no finite numbers", "repair the run")
        return values

    def optional(self, key: str) -> np.ndarray | None:
        """Return one reading per point where the scan recorded it."""
        return self.column(key) if self._has(key) else None

    def _has(self, key: str) -> bool:
        return key in self._readings and (self._earlier is None or self._earlier._has(key))

    def axes(self) -> list[np.ndarray]:
        """Return the rocking circle's readings (deg), or the modulator's x and y (um)."""
        return [self.column(key) for key in self._axes]

    @property
    def _points(self) -> int:
        """Points of the scan up to the end of this run."""
        return int(np.count_nonzero(~self._marked)) + (self._earlier._points if self._earlier else 0)

    @property
    def has_sentinels(self) -> bool:
        """Whether frames were taken between the points."""
        return bool(self._marked.any()) or (self._earlier is not None and self._earlier.has_sentinels)

    def sentinel_after(self) -> np.ndarray:
        """Index of the point after which each sentinel was taken; 0 where it was taken before the first."""
        before = self._earlier._points if self._earlier else 0
        own = before + np.cumsum(~self._marked)[self._marked] - 1
        joined = np.concatenate([self._earlier.sentinel_after(), own]) if self._earlier else own
        return np.maximum(joined, 0)

    @property
    def cutoff(self) -> float | None:
        """Counts from which a pixel is saturated."""
        cutoff = self.get("detector").get("count_cutoff")
        return None if cutoff is None else float(np.float32(cutoff))

    def frames(self) -> tuple[FrameSource, np.ndarray]:
        """Return the window of each point's frame, and the pixels of it known to be bad."""
        frames, bad = self._own_frames()
        if self._earlier is None:
            return frames, bad
        before, bad_before = self._earlier.frames()
        return _JoinedFrames(before, frames), bad | bad_before

    def _own_frames(self) -> tuple[_WindowFrames, np.ndarray]:
        points = len(self._own(self._axes[0]))
        image = self._stream[IMAGE]
        files, dataset = local_files(image)
        source = _LocalFrames(files, dataset) if files else _ServedFrames(image)
        told = "eiger_frame" in self._readings
        wanted = self._own("eiger_frame").astype(int) if told else np.arange(points)
        if (points == 0 and not self._sentinels) or wanted.max(initial=-1) >= source.length:
            wrong = f"{points} points but {source.length} frames"
            raise self.fail(IMAGE, wrong, "restore the detector's files")
        shape = tuple(image.shape[1:])
        cut = self._window(shape)
        bad = np.zeros(shape, bool)
        for axis, name in enumerate(("masked_rows", "masked_columns")):
            for first, last in self.get("detector", name):
                bad[(slice(None),) * axis + (slice(first, last + 1),)] = True
        if files:
            bad |= self._pixel_mask(files[0], shape)
        return _WindowFrames(source, wanted, cut), bad[cut]

    def _window(self, shape: tuple[int, ...]) -> tuple[slice, slice]:
        size, *centre = (int(self.get("window", name)) for name in ("size", "row", "column"))
        cut = [slice(c - size // 2, c - size // 2 + size) for c in centre]
        if size < 1 or any(s.start < 0 or s.stop > n for s, n in zip(cut, shape, strict=True)):
            wrong = f"window of {size} around {tuple(centre)} does not lie on a detector of {shape}"
            raise self.fail("start document", wrong, "correct the window")
        return cut[0], cut[1]

    def _pixel_mask(self, data_file: Path, shape: tuple[int, ...]) -> np.ndarray:
        master = data_file.with_name(re.sub(r"_data_\d+\.h5$", "_master.h5", data_file.name))
        if master == data_file or not master.exists():
            return np.zeros(shape, bool)
        with Reader(master) as reader:
            if not reader.has(PIXEL_MASK):
                return np.zeros(shape, bool)
            return reader.array(PIXEL_MASK, shape=shape, kinds="iu") != 0

    def metadata(self) -> dict[str, Any]:
        """Return the provenance that travels with the scan."""
        kept = (
            "plan_name", "scan_kind", "scan_id", "time", "exposure_s", "beamline", "sample", "proposal",
            "modulator", "modulator_position_um", "calibration", "geometry", "window", "rocking",
        )  # fmt: skip
        found = {key: self.start[key] for key in kept if key in self.start}
        return {
            "run_uid": self.start["uid"],
            **({"continues": self._earlier.metadata()["run_uid"]} if self._earlier else {}),
            **found,
            "exit_status": self._stop.get("exit_status", "unknown"),
        }


def local_files(image: Any) -> tuple[list[Path], str]:
    """Return the detector's files in order if all are on this machine, else none; and the dataset in them."""
    sources = image.data_sources() or []
    if len(sources) != 1 or "dataset" not in sources[0].parameters:
        return [], ""
    assets = sorted(sources[0].assets, key=lambda asset: asset.num or 0)
    files = [Path(unquote(urlparse(asset.data_uri).path)) for asset in assets]
    return (files if all(path.is_file() for path in files) else []), sources[0].parameters["dataset"]


def _relative(flux: np.ndarray | None) -> np.ndarray | None:
    """Flux over its mean; None for a monitor that saw nothing."""
    return None if flux is None or not (flux > 0).all() else flux / flux.mean()


def _scan(client: Any, *, in_memory: bool, sentinels: bool = False) -> Scan:
    """Build the scan of a run; frames that stay on disk are read when sliced."""
    run = _Run(client, sentinels)
    window, bad = run.frames()
    if window.shape[0] == 0:
        raise run.fail("primary", "has no sentinels", "take the scan with sentinel_every or revisit_every")
    source: FrameSource = window[:] if in_memory else window
    clean, bad = clean_frames(source, bad, run.cutoff, per_frame=run.kind == "rocking")
    frames = cast(np.ndarray, clean[:] if in_memory else clean)
    beside = in_memory and not sentinels and run.kind == "rocking" and run.has_sentinels
    return _built(run, frames, bad, _Run(client, sentinels=True).frames()[0][:] if beside else None)


class GrowingScan:
    """The scan of a run as it grows: what has come is kept, what is new is read."""

    def __init__(self) -> None:
        self._frames: KeptFrames | None = None
        self._beside: np.ndarray | None = None

    def __call__(self, client: Any) -> Scan:
        """Return the scan of the run as `client` gives it by now, the same that `load` would.

        Raises
        ------
        FileError
            As `load`; what was kept is kept.
        """
        run = _Run(client)
        window, bad = run.frames()
        if self._frames is None:
            self._frames = KeptFrames(run.cutoff, run.kind == "rocking")
        frames, bad = self._frames.grow(window, bad)
        if run.kind == "rocking" and run.has_sentinels:
            beside = _Run(client, sentinels=True).frames()[0]
            known = self._beside
            new = beside[slice(0 if known is None else len(known), beside.shape[0])]
            self._beside = new if known is None else np.concatenate([known, new])
        return _built(run, frames, bad, self._beside)


def _built(run: _Run, frames: np.ndarray, bad: np.ndarray, sentinels: np.ndarray | None) -> Scan:
    """Put a scan together from clean `frames` and the counts of its sentinels."""
    try:
        geometry = Geometry(**run.get("geometry"))
    except (TypeError, ValueError) as error:
        raise run.fail("start document", f"geometry: {error}", "correct it") from None
    if bad.all():
        raise run.fail("window", "every pixel is masked", "move the window off the gaps")
    axes, metadata = run.axes(), run.metadata()
    flux = _relative(run.optional("monitor_flux"))
    if run.kind == "ptychography":
        return PtychographyScan(
            frames=frames,
            positions=np.column_stack(axes) * 1e-6,
            mask=bad,
            wavelength=geometry.wavelength,
            propagation_distance=geometry.propagation_distance,
            pixel_size=geometry.pixel_size,
            sample_distance=geometry.modulator_distance,
            flux=flux,
            metadata=metadata,
        )
    modulator_in = run.get("modulator") == "in"
    place = run.get("modulator_position_um") if modulator_in else None
    return RockingScan(
        frames=frames,
        angles_deg=int(run.get("rocking", "sense")) * (axes[0] - float(run.get("rocking", "peak_deg"))),
        mask=bad,
        geometry=geometry if modulator_in else geometry.with_modulator(0.0),
        flux=flux,
        modulator_position=None if place is None else (place["x"] * 1e-6, place["y"] * 1e-6),
        count_cutoff=run.cutoff,
        metadata=metadata,
        sentinels=None if sentinels is None else mask_frames(sentinels, bad, run.cutoff),
        sentinel_after=None if sentinels is None else run.sentinel_after(),
    )


def load(
    source: str | Path | Any,
    catalog: Catalog | None = None,
    *,
    window: int | None = None,
    angles_deg: np.ndarray | None = None,
    two_theta_deg: float | None = None,
) -> Scan:
    """Load a scan from a file, a run, or a run's uid.

    Parameters
    ----------
    source : path, str or run
        A CXI file, an Eiger's master file, or one laid out as at ID01; a run of the catalogue
        (``catalog[-1]``); or the beginning of a run's uid.
    catalog : Catalog, optional
        Where to look for the uid.
    window, angles_deg, two_theta_deg : optional
        For frames by others, as in `read_eiger`.

    Returns
    -------
    RockingScan or PtychographyScan
        From a run: frames float32, cut to the window with the zero frequency at ``size // 2``; 0 where
        masked. Sentinels of a rocking scan come along, cut and masked as the frames.

    Raises
    ------
    FileError
        In one line: what the file or the run lacks and the mend.
    CatalogError
        When the catalogue has no such run.
    """
    if isinstance(source, Path) or (
        isinstance(source, str) and (Path(source).suffix or Path(source).exists())
    ):
        return _load_file(source, window, angles_deg, two_theta_deg)
    if isinstance(source, str):
        if catalog is None:
            raise ValueError(f"{source!r} is no file; give the catalogue that holds this run")
        source = catalog.run(source)
    return _scan(source, in_memory=True)


def load_sentinels(run: Any) -> Scan:
    """Load the frames that a scan took between its points, at the peak or at its centre, as a scan.

    Parameters
    ----------
    run : run of the catalogue

    Raises
    ------
    FileError
        In one line: when the run has none.
    """
    return _scan(run, in_memory=True, sentinels=True)


def _load_file(
    path: str | Path, window: int | None, angles_deg: np.ndarray | None, two_theta_deg: float | None
) -> Scan:
    with Reader(path) as reader, reader.guard("content"):
        if is_eiger_master(reader):
            return read_master(reader, angles_deg, two_theta_deg, window)
        if found := find_scan(reader):
            return read_scan(reader, *found, window)
    content = read_cxi(path)
    if not isinstance(content, Scan):
        raise file_error(path, "content", f"is a {type(content).__name__}, not a scan", "name another file")
    return content


def export(run: Any, path: str | Path, format: str = "cxi") -> None:
    """Write a run into a file that other programs open, block by block: memory does not grow with the scan.

    Parameters
    ----------
    run : run of the catalogue
    path : path
    format : {"cxi", "nexus", "id01"}

    Raises
    ------
    ValueError
        For a format that is not available.
    FileError
        In one line: what the run lacks, or why the file cannot be written.
    """
    if format not in _FORMATS:
        raise ValueError(f"no export format {format!r}; available: {', '.join(_FORMATS)}")
    _FORMATS[format](path, _scan(run, in_memory=False))


_FORMATS = {"cxi": write_cxi, "nexus": write_nexus, "id01": write_id01}
