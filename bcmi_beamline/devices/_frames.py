"""The window of a frame that is looked at while a scan runs: read from the growing file, put in numbers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import h5py
import hdf5plugin  # noqa: F401  registers the bitshuffle-LZ4 filter
import numpy as np

DATASET = "/entry/data/data"
VISIBLE_WITHIN_S = 5.0
"""How long a flushed frame may take to appear on this machine (network file systems)."""

HIGH_Q_PIXELS = 60.0
"""Distance from the beam beyond which the modulator's side walls, rather than the crystal, scatter."""


@dataclass(frozen=True)
class Window:
    """Square of the detector: `size` pixels along an edge, zero frequency at `row`, `column`.

    Raises
    ------
    ValueError
        From `check`, when it does not lie on the detector.
    """

    size: int
    row: int
    column: int

    @property
    def slices(self) -> tuple[slice, slice]:
        """Rows and columns; the beam at index ``size // 2`` of both."""
        first_row, first_column = self.row - self.size // 2, self.column - self.size // 2
        return slice(first_row, first_row + self.size), slice(first_column, first_column + self.size)

    def check(self, rows: int, columns: int) -> Window:
        """Return itself if it lies on a detector of `rows` x `columns`."""
        for what, cut, limit in zip(("rows", "columns"), self.slices, (rows, columns), strict=True):
            if self.size < 2 or cut.start < 0 or cut.stop > limit:
                raise ValueError(
                    f"window of {self.size} around ({self.row}, {self.column}) needs {what} {cut.start} to "
                    f"{cut.stop - 1} of a detector with {limit}: choose a smaller one"
                )
        return self


class FrameStatistics:
    """What is told of each frame in the events: totals and how much scatters far from the beam.

    Parameters
    ----------
    good : ndarray of bool, shape (size, size)
        Pixels of the window that count.
    cutoff : int
        Counts from which a pixel is saturated.
    invalid : int
        Reading of a pixel that cannot count (gap, dead).
    high_q_px : float, optional
        Pixels from the beam beyond which counts are far; `HIGH_Q_PIXELS` where absent.

    Notes
    -----
    ``high_q_x`` is the share of counts with ``|q_x| > 60 px`` and ``|q_x| > 1.5 |q_y|``: the side walls of a
    tilted modulator smear the pattern and lower it. The 60 px, an angle, hold for any window but stay inside
    a small one (0.23 of its edge). Saturated pixels are counted and left out of everything else.
    """

    def __init__(self, good: np.ndarray, cutoff: int, invalid: int, high_q_px: float | None = None) -> None:
        size = good.shape[0]
        q = np.abs(np.arange(size) - size // 2)
        qy, qx = q[:, None], q[None, :]
        edge = min(HIGH_Q_PIXELS, 0.23 * size) if high_q_px is None else high_q_px
        self._good, self.cutoff, self._invalid = good, cutoff, invalid
        self._far_x = (qx > edge) & (qx > 1.5 * qy)
        self._far_y = (qy > edge) & (qy > 1.5 * qx)

    def __call__(self, frame: np.ndarray) -> dict[str, float]:
        """Statistics of the window of one frame, uint32 (size, size)."""
        counting = self._good & (frame != self._invalid)
        saturated = counting & (frame >= self.cutoff)
        counts = np.where(counting & ~saturated, frame, 0)
        total = int(counts.sum(dtype=np.int64))
        far_x = int(counts[self._far_x].sum(dtype=np.int64))
        far_y = int(counts[self._far_y].sum(dtype=np.int64))
        return {
            "total": total,
            "max": int(counts.max()),
            "high_q_x": far_x / max(total, 1),
            "high_q_y": far_y / max(total, 1),
            "saturated": int(saturated.sum()),
        }


class FrameReader:
    """Reads windows of frames from the file that the detector is writing (SWMR)."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._file: h5py.File | None = None
        self._data: h5py.Dataset | None = None

    def read(
        self, path: Path, row: int, window: Window, meanwhile: Callable[[], object] = lambda: None
    ) -> np.ndarray:
        """Window of frame `row` of the file, uint32 (size, size).

        Parameters
        ----------
        meanwhile : callable, optional
            Called before each look again at a file that does not hold the frame yet; it may raise.

        Raises
        ------
        OSError
            One line: what is not there, and where it was looked for.
        """
        deadline = time.monotonic() + VISIBLE_WITHIN_S
        while True:
            try:
                data = self._dataset(path)
                if data.shape[0] > row:
                    return data[(row, *window.slices)]
                problem = f"holds {data.shape[0]} frames"
            except (OSError, KeyError) as error:
                self.close()
                problem = "does not exist" if not path.exists() else f"cannot be read ({error})"
            if time.monotonic() > deadline:
                raise OSError(
                    f"frame {row} of {path} did not appear within {VISIBLE_WITHIN_S:g} s, the file {problem}"
                    ": FilePath must be a folder that the detector writes and this machine reads"
                )
            meanwhile()
            time.sleep(0.02)

    def _dataset(self, path: Path) -> h5py.Dataset:
        if self._data is None or path != self._path:
            self.close()
            self._file, self._path = h5py.File(path, "r", libver="latest", swmr=True), path
            data = self._file[DATASET]
            assert isinstance(data, h5py.Dataset)
            self._data = data
        self._data.refresh()
        return self._data

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()
            self._file = self._data = None
