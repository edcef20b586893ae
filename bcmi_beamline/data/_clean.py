"""Bad pixels: known, hot, dead or lost; and frames without them."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from scipy import ndimage

BLOCK_BYTES = 64 * 2**20
ROOM = 256
"""Frames of a growing scan for which there is room from the first on. Memory that is not written costs
nothing; to move all frames to a larger place makes the next one late."""
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


class _Survey:
    """What each pixel of (rows, columns) did over the frames it was shown."""

    def __init__(self, shape: tuple[int, ...], invalid: int, cutoff: float | None) -> None:
        self._invalid, self._cutoff, self._frames = invalid, cutoff, 0
        self._total, self._largest = np.zeros(shape), np.zeros(shape)
        self._counting, self._lost = np.zeros(shape, int), np.zeros(shape, int)
        self._saturated = np.zeros(shape, bool)

    def add(self, counts: np.ndarray) -> None:
        """Look at more frames, (J, rows, columns)."""
        if not len(counts):
            return
        bad = _lost(counts, self._invalid)
        valid = np.where(bad, 0, counts)
        self._frames += len(counts)
        self._total += valid.sum(axis=0, dtype=float)
        self._largest = np.maximum(self._largest, valid.max(axis=0))
        self._counting += np.count_nonzero(valid, axis=0)
        self._lost += bad.sum(axis=0)
        if self._cutoff is not None:
            self._saturated |= (valid >= self._cutoff).any(axis=0)

    def judge(self, bad: np.ndarray, per_frame: bool) -> np.ndarray:
        """Pixels not to be used, with those known to be `bad`; `per_frame` as in `clean_frames`."""
        if per_frame and self._cutoff is not None:
            bad = bad | (self._lost == self._frames)
        else:
            bad = bad | (self._lost > 0) | self._saturated
        # without the frame that has most, so that a single cosmic ray condemns no pixel
        total = self._total - self._largest
        return bad | find_hot_and_dead(total, self._counting, self._frames, bad)


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
    survey, step = _Survey(source.shape[1:], invalid, cutoff), frames_per_block(source)
    for start in range(0, source.shape[0], step):
        survey.add(source[start : start + step])
    bad = survey.judge(bad, per_frame)
    return CleanFrames(source, bad, invalid, cutoff), bad


class KeptFrames:
    """Frames of a scan that grows, in memory: each is read once.

    Parameters
    ----------
    cutoff, per_frame
        As for `clean_frames`.
    """

    def __init__(self, cutoff: float | None, per_frame: bool) -> None:
        self._cutoff, self._per_frame = cutoff, per_frame
        self._length = 0

    def grow(self, source: FrameSource, bad: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Read what `source` has beyond what was read before.

        Returns
        -------
        frames : ndarray, (J, Ny, Nx), float32
            All of them, as `clean_frames` gives them. What was returned before stays as it was.
        bad : ndarray, (Ny, Nx), bool
        """
        known, length = self._length, source.shape[0]
        self._reserve(source, bad)
        if length > known:
            self._counts[known:length] = source[known:length]
            self._survey.add(self._counts[known:length])
            self._length = length
        bad = self._survey.judge(bad, self._per_frame)
        changed = bad ^ self._mask
        if changed.any():
            before, self._frames, self._mask = self._frames, np.empty_like(self._frames), bad
            self._frames[:known] = before[:known]
            self._frames[:known, changed] = self._clean(self._counts[:known, changed], bad[changed])
        self._frames[known:length] = self._clean(self._counts[known:length], bad)
        return self._frames[:length], bad

    def _reserve(self, source: FrameSource, bad: np.ndarray) -> None:
        """Make room for at least the frames of `source`."""
        if self._length == 0:
            self._invalid, self._mask = _invalid(source.dtype), bad
            self._survey = _Survey(bad.shape, self._invalid, self._cutoff)
            self._counts = np.empty((0, *bad.shape), source.dtype)
            self._frames = np.empty((0, *bad.shape), np.float32)
        if source.shape[0] > len(self._counts):
            shape = max(ROOM, 2 * source.shape[0]), *bad.shape
            counts, frames = np.empty(shape, self._counts.dtype), np.empty(shape, np.float32)
            counts[: self._length] = self._counts[: self._length]
            frames[: self._length] = self._frames[: self._length]
            self._counts, self._frames = counts, frames

    def _clean(self, counts: np.ndarray, bad: np.ndarray) -> np.ndarray:
        return CleanFrames(counts, bad, self._invalid, self._cutoff)[:]
