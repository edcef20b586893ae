"""The files of one arming: a master, and data files that can be read while they grow (SWMR)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import h5py
import hdf5plugin
import numpy as np

DATASET = "/entry/data/data"

Compression = Literal["none", "LZ4", "BS LZ4"]


@dataclass(frozen=True)
class SeriesSettings:
    """What the files of a series say about it; SI units."""

    images: int
    """Per trigger."""
    triggers: int
    images_per_file: int
    exposure_s: float
    period_s: float
    wavelength: float
    photon_energy_ev: float
    threshold_energy_ev: float
    distance: float
    beam_center: tuple[float, float]
    """(x, y), pixels."""
    pixel_size: float
    bit_depth: int
    count_cutoff: int
    compression: Compression

    @property
    def frames(self) -> int:
        """Frames of the whole series."""
        return self.images * self.triggers


@dataclass(frozen=True)
class Stored:
    """Where a series stands."""

    frames: int
    file: str
    """That holds the latest frame, or will hold the first."""


class Series:
    """Master and data files of one arming.

    The master appears at once and links the data files of the whole series; should the series end early, it
    is replaced by one that links those that exist.

    Parameters
    ----------
    stem : Path
        Folder and file name up to ``_master.h5`` and ``_data_000001.h5``.
    settings : SeriesSettings
    pixel_mask : ndarray, (rows, columns), uint32
        0 is good.
    resume : bool
        Take over the files of a process that was killed, mending the last: `close` them then.

    Raises
    ------
    OSError
        One line: the file and why it cannot be written.
    """

    def __init__(
        self, stem: Path, settings: SeriesSettings, pixel_mask: np.ndarray, resume: bool = False
    ) -> None:
        self._stem = stem
        self._settings = settings
        self._pixel_mask = pixel_mask
        self._file: h5py.File | None = None
        self._data: h5py.Dataset | None = None
        self._press: h5py.Dataset | None = None
        self._files = 0
        self.frames = 0
        """Frames on disk."""
        if resume:
            self._take_over()
            return
        folder = stem.parent
        if not folder.is_dir():
            raise OSError(f"FilePath {folder} is no folder: make it, or set another")
        if not os.access(folder, os.W_OK):
            raise OSError(f"FilePath {folder} cannot be written: set another")
        if self.master.exists():
            raise OSError(f"{self.master} exists: change FWNamePattern, or let it contain $id")
        self._write_master(-(-settings.frames // settings.images_per_file))

    @property
    def master(self) -> Path:
        """The file that describes the series and links its data."""
        return self._stem.with_name(f"{self._stem.name}_master.h5")

    def data_file(self, number: int) -> Path:
        """Data file `number`, from 1."""
        return self._stem.with_name(f"{self._stem.name}_data_{number:06d}.h5")

    @property
    def current_file(self) -> Path:
        """The file that holds the latest frame, or will hold the first."""
        return self.data_file(max(self._files, 1))

    # -- data -------------------------------------------------------------------------------------
    def pack(self, frame: np.ndarray) -> bytes:
        """Compress a frame for `append`, as the detector does while it still exposes the next."""
        if self._press is None:
            memory = h5py.File(f"{self._stem}_{id(self)}", "w", driver="core", backing_store=False)
            self._press = self._dataset(memory, "frame", 1, frame.shape)
        self._press[0] = frame.astype(self._press.dtype, copy=False)
        self._press.flush()
        return self._press.id.read_direct_chunk((0, 0, 0))[1]

    def append(self, packed: bytes) -> None:
        """Write a packed frame; it is on disk and visible to readers when this returns.

        Raises
        ------
        OSError
            When the disk does not take it.
        """
        if self._data is None:
            self._data = self._open_next()
        count = self._data.shape[0]
        self._data.resize(count + 1, axis=0)
        self._data.id.write_direct_chunk((count, 0, 0), packed)
        self._data.flush()
        self.frames += 1
        if count + 1 == self._settings.images_per_file:
            self._close_file()

    def write(self, frame: np.ndarray) -> None:
        """Pack a frame and append it."""
        self.append(self.pack(frame))

    def _open_next(self) -> h5py.Dataset:
        path = self.data_file(self._files + 1)
        self._file = file = h5py.File(path, "x", libver="latest")
        self._files += 1
        entry = file.create_group("entry")
        entry.attrs["NX_class"] = "NXentry"
        entry.create_group("data").attrs["NX_class"] = "NXdata"
        data = self._dataset(file, DATASET, 0, self._pixel_mask.shape)
        data.attrs["image_nr_low"] = self.frames + 1
        file.swmr_mode = True
        return data

    def _dataset(self, file: h5py.File, name: str, frames: int, shape: tuple[int, ...]) -> h5py.Dataset:
        return file.create_dataset(
            name,
            shape=(frames, *shape),
            maxshape=(None, *shape),
            chunks=(1, *shape),
            dtype=f"u{self._settings.bit_depth // 8}",
            **_filter(self._settings.compression),
        )

    def _take_over(self) -> None:
        """Count what is there, copying a file that was not closed to one that was."""
        while (path := self.data_file(self._files + 1)).exists():
            beside = path.with_suffix(".part")
            with h5py.File(path, "r", libver="latest", swmr=True) as broken:
                count = broken[DATASET].shape[0]  # pyright: ignore[reportAttributeAccessIssue]
                with h5py.File(beside, "w", libver="latest") as mended:
                    broken.copy("entry", mended)
            beside.replace(path)
            self._files += 1
            self.frames += count

    def _close_file(self) -> None:
        file, self._file, self._data = self._file, None, None
        if file is not None:
            file.close()

    def close(self) -> None:
        """Close what is open and let the master link what there is."""
        self._close_file()
        if self._press is not None:
            self._press.file.close()
            self._press = None
        if self.frames < self._settings.frames:
            self._write_master(self._files)

    # -- master -----------------------------------------------------------------------------------
    def _write_master(self, files: int) -> None:
        temporary = self.master.with_suffix(".part")
        with h5py.File(temporary, "w", libver="latest") as file:
            entry = _group(file, "entry", "NXentry")
            entry["definition"] = "NXmx"
            data = _group(entry, "data", "NXdata")
            for number in range(1, files + 1):
                data[f"data_{number:06d}"] = h5py.ExternalLink(self.data_file(number).name, DATASET)
            instrument = _group(entry, "instrument", "NXinstrument")
            beam = _group(instrument, "beam", "NXbeam")
            _quantity(beam, "incident_wavelength", self._settings.wavelength * 1e10, "angstrom")
            self._describe_detector(_group(instrument, "detector", "NXdetector"))
        temporary.replace(self.master)

    def _describe_detector(self, detector: h5py.Group) -> None:
        settings = self._settings
        for name, value, unit in (
            ("x_pixel_size", settings.pixel_size, "m"),
            ("y_pixel_size", settings.pixel_size, "m"),
            ("detector_distance", settings.distance, "m"),
            ("beam_center_x", settings.beam_center[0], "pixel"),
            ("beam_center_y", settings.beam_center[1], "pixel"),
            ("count_time", settings.exposure_s, "s"),
            ("frame_time", settings.period_s, "s"),
            ("threshold_energy", settings.threshold_energy_ev, "eV"),
        ):
            _quantity(detector, name, value, unit)
        detector["bit_depth_image"] = settings.bit_depth
        detector["description"] = "Eiger2 2M (simulated)"
        specific = _group(detector, "detectorSpecific", "NXcollection")
        _quantity(specific, "photon_energy", settings.photon_energy_ev, "eV")
        specific["nimages"] = settings.images
        specific["ntrigger"] = settings.triggers
        specific["countrate_correction_count_cutoff"] = settings.count_cutoff
        specific.create_dataset("pixel_mask", data=self._pixel_mask, **_filter("BS LZ4"))


def _filter(compression: Compression) -> dict:
    if compression == "none":
        return {}
    return dict(hdf5plugin.Bitshuffle(cname="lz4") if compression == "BS LZ4" else hdf5plugin.LZ4())


def _group(parent: h5py.Group, name: str, nexus_class: str) -> h5py.Group:
    group = parent.create_group(name)
    group.attrs["NX_class"] = nexus_class
    return group


def _quantity(group: h5py.Group, name: str, value: float, unit: str) -> None:
    group[name] = value
    group[name].attrs["units"] = unit
