"""Bad pixels: known, hot, dead or lost; and frames without them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy import ndimage

BLOCK_BYTES = 64 * 2**20
_HOT_FACTOR = 5.0
_DEAD_NEIGHBOURS = 100.0
_FEWEST_FRAMES = 8
_NEIGHBOURS = np.array([[1, 1, 1], [1, 0, 1], [1, 1, 1]], bool)


class FrameSource(Protocol):
    """Frames of one window, read when sliced along the first axis; counts."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...
    def __getitem__(self, key: slice, /) -> np.ndarray: ...


class CleanFrames:
    """Frames as float32, bad pixels 0, lost counts (``invalid``) at the cutoff."""

    ndim = 3
    dtype = np.dtype(np.float32)

    def __init__(self, source: FrameSource, mask: np.ndarray, invalid: int, cutoff: float | None) -> None:
        self._source, self._mask, self._invalid, self._cutoff = source, mask, invalid, cutoff
        self.shape = source.shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: slice, /) -> np.ndarray:
        counts = self._source[key]
        frames = counts.astype(np.float32)
        if self._cutoff is not None:
            frames[_lost(counts, self._invalid)] = self._cutoff
        frames[:, self._mask] = 0
        return frames


@dataclass
class _Survey:
    """What each pixel did over a scan, (rows, columns) each."""

    total: np.ndarray
    """Counts of all frames but the one with most, so that a single cosmic ray condemns no pixel."""
    counting: np.ndarray
    """Frames with any counts."""
    invalid: np.ndarray
    """Frames without a valid count."""
    saturated: np.ndarray
    """Whether any frame reached the cutoff."""


def _survey(source: FrameSource, invalid: int, cutoff: float | None) -> _Survey:
    shape = source.shape[1:]
    total, largest = np.zeros(shape), np.zeros(shape)
    counting, lost, saturated = np.zeros(shape, int), np.zeros(shape, int), np.zeros(shape, bool)
    step = frames_per_block(source)
    for start in range(0, source.shape[0], step):
        counts = source[start : start + step]
        bad = _lost(counts, invalid)
        valid = np.where(bad, 0, counts)
        total += valid.sum(axis=0, dtype=float)
        largest = np.maximum(largest, valid.max(axis=0))
        counting += np.count_nonzero(valid, axis=0)
        lost += bad.sum(axis=0)
        if cutoff is not None:
            saturated |= (valid >= cutoff).any(axis=0)
    return _Survey(total - largest, counting, lost, saturated)


def _lost(counts: np.ndarray, invalid: int) -> np.ndarray:
    """Where a detector says that it has no count: its largest number, or one below zero."""
    lost = counts == invalid
    return lost if counts.dtype.kind == "u" else lost | ~(counts >= 0)


def frames_per_block(source: FrameSource) -> int:
    """How many frames are worked on at once, so that memory does not grow with the scan."""
    return max(1, BLOCK_BYTES // int(np.prod(source.shape[1:]) * source.dtype.itemsize))


def find_hot_and_dead(total: np.ndarray, counting: np.ndarray, frames: int, mask: np.ndarray) -> np.ndarray:
    """Pixels that disagree with all their neighbours in a way no far field does.

    An oversampled far field changes little from pixel to pixel. Hot: counts in half the frames or more and
    five times more than the best of its eight neighbours. Dead: no count at all where each neighbour has a
    hundred.

    Parameters
    ----------
    total : ndarray, (Ny, Nx)
        Counts over the scan.
    counting : ndarray, (Ny, Nx)
        Frames in which the pixel counted.
    frames : int
        Frames in all; with fewer than eight nothing is judged.
    mask : ndarray, (Ny, Nx), bool
        Pixels known to be bad, which judge no others.

    Returns
    -------
    ndarray, (Ny, Nx), bool
    """
    if frames < _FEWEST_FRAMES:
        return np.zeros_like(mask)
    known = np.where(mask, 0, total)
    best = ndimage.maximum_filter(known, footprint=_NEIGHBOURS, mode="constant", cval=0)
    hot = (2 * counting >= frames) & (known > _HOT_FACTOR * (best + np.sqrt(best)))
    worst = ndimage.minimum_filter(
        np.where(mask, np.inf, total), footprint=_NEIGHBOURS, mode="constant", cval=np.inf
    )
    dead = (total == 0) & (worst >= _DEAD_NEIGHBOURS) & np.isfinite(worst)
    return (hot | dead) & ~mask


def _invalid(dtype: np.dtype) -> int:
    """What stands for no count: the largest value of an integer type."""
    return int(np.iinfo(dtype).max) if dtype.kind in "iu" else -1


def mask_frames(counts: np.ndarray, mask: np.ndarray, cutoff: float | None) -> np.ndarray:
    """Frames as float32, (J, Ny, Nx): 0 under a mask that is known, the cutoff where counts were lost."""
    return CleanFrames(counts, mask, _invalid(counts.dtype), cutoff)[:]


def clean_frames(
    source: FrameSource, bad: np.ndarray, cutoff: float | None, *, per_frame: bool
) -> tuple[CleanFrames, np.ndarray]:
    """Frames to work with, and the pixels of them that must not be used.

    Parameters
    ----------
    source : array or alike, (J, Ny, Nx)
        Counts; the largest value of an integer type, and whatever is below zero, stands for none.
    bad : ndarray, (Ny, Nx), bool
        Pixels known to be bad.
    cutoff : float, optional
        Counts from which a pixel is saturated.
    per_frame : bool
        Whether saturation is told frame by frame (`CleanFrames` then holds the cutoff there); otherwise a
        pixel that ever saturated is masked.
    """
    invalid = _invalid(source.dtype)
    seen = _survey(source, invalid, cutoff)
    if per_frame and cutoff is not None:
        bad = bad | (seen.invalid == source.shape[0])
    else:
        bad = bad | (seen.invalid > 0) | seen.saturated
    bad = bad | find_hot_and_dead(seen.total, seen.counting, source.shape[0], bad)
    return CleanFrames(source, bad, invalid, cutoff), bad
