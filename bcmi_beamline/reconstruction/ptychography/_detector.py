"""The measured side of ptychography: frames, which of their pixels count, and what the detector does."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from bcmi_beamline.reconstruction.ptychography._kernels import FREE

PIXEL_SPREAD = 1 / 24
"""Of `blur`: a pixel adds up the intensity over its area, which to second order is that at its centre plus
1/24 of its Laplacian."""


@dataclass
class Detector:
    """Frames as they were measured, and the window of them that is used.

    Parameters
    ----------
    frames : ndarray, (J, Ny, Nx)
        Counts, zero frequency at ``n // 2``; any real dtype, never copied as a whole.
    states : ndarray, (S, Ny, Nx), uint8
        0 for a pixel to use, `kernels.MASKED`, `kernels.FREE`; frame j takes set ``j % S``.
    window : (ny, nx)
        Of the pixels about the zero frequency; a smaller window is a coarser object on the same field.
    spread : float
        Of `kernels.blur`: `PIXEL_SPREAD` for pixels that integrate, 0 for points.
    finer : int
        Points per pixel and axis at which waves are computed: a field so many times wider, for beams that
        fill more than the far field of one pixel.
    """

    frames: np.ndarray
    states: np.ndarray
    window: tuple[int, int]
    spread: float = 0.0
    finer: int = 1
    used: np.ndarray = field(init=False)
    """(S, ny, nx), float32, zero frequency at the corner; 1 where a pixel is used."""
    free: list[np.ndarray] = field(init=False)
    """Rows and columns (n, 2) of the free pixels of every set, zero frequency at the corner."""
    corner: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        (ny, nx), full = self.window, self.frames.shape[1:]
        top, left = full[0] // 2 - ny // 2, full[1] // 2 - nx // 2
        self.corner = top, left
        cut = np.fft.ifftshift(self.states[:, top : top + ny, left : left + nx], axes=(1, 2))
        self.used = (cut == 0).astype(np.float32)
        self.free = [np.argwhere(s == FREE) for s in cut]

    def tilt(self) -> np.ndarray:
        """Phase ramp (s ny, s nx) that a wave is multiplied with so that its points fall evenly on pixels.

        The points of a pixel then lie about its centre, not beside it.
        """
        y, x = (
            np.exp(1j * np.pi * (self.finer - 1) * (np.arange(n) - n // 2) / n)
            for n in (self.finer * w for w in self.window)
        )
        return (y[:, None] * x).astype(np.complex64)

    def sets(self, index: np.ndarray) -> np.ndarray:
        """Which set of pixels every frame of `index` uses."""
        return index % len(self.used)
