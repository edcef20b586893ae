"""One object, its data and the passes over memory that iterate it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from scipy import fft as sp_fft

from bcmi_beamline.reconstruction.conventional._updates import (
    UPDATES,
    accelerate,
    difference_map_close,
    difference_map_estimates,
    free_log_likelihood,
    project_modulus,
)
from bcmi_beamline.reconstruction.fourier import WORKERS

ANSCOMBE = 3 / 8


class Engine:
    """Iterates an object towards measured moduli and a support; corner origin, complex64.

    A three-dimensional transform reads its array three times and a separate update twice more. Here the
    in-plane transforms are done frame by frame together with the update, and the transforms along the
    rocking axis a few rows at a time together with the modulus projection, each while the data are in cache.

    Parameters
    ----------
    packed : ndarray, (J, Ny, Nx), float32
        Counts with mask and free pixels marked (`pack`), corner origin.
    rho : ndarray, (J, Ny, Nx), complex64
        Start; iterated in place.
    support : ndarray, (J, Ny, Nx), bool
    workers : int
        Threads.
    """

    def __init__(
        self, packed: np.ndarray, rho: np.ndarray, support: np.ndarray, workers: int = WORKERS
    ) -> None:
        self.packed = packed
        self.rho = rho
        self.support = support
        self.psi = np.empty_like(rho)
        self._previous: np.ndarray | None = None
        self._momentum = 1.0
        self._total = float(packed[packed >= 0].sum(dtype=float)) or 1.0
        self._n_free = int(np.count_nonzero((packed < 0) & (packed > -1e29)))
        self._frames = _portions(rho.shape[0], rho[0].nbytes)
        self._rows = _portions(rho.shape[1], rho[:, 0].nbytes)
        self._pool = ThreadPoolExecutor(max(1, workers))
        self.error = float("nan")
        self.free_llk = float("nan")

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    # -- iterations ---------------------------------------------------------------------------------
    def step(self, algorithm: str, beta: float) -> None:
        """One iteration of ``"er"``, ``"hio"``, ``"raar"``, ``"dm"`` or ``"ml"``.

        Sets `error` and `free_llk` of the iterate that the step started from. ``"ml"`` is accelerated
        projected gradient on variance-stabilised amplitudes; `beta` has no part in it.
        """
        if algorithm != "ml":
            self._previous = None
        if algorithm == "dm":
            self._project(difference_map_estimates, beta)
            error, free_llk = self.error, self.free_llk
            self._project(difference_map_close, beta, source=self.psi)
            self.error, self.free_llk = error, free_llk
        elif algorithm == "ml":
            self._accelerated()
        else:
            self._project(UPDATES[algorithm], beta)

    def finish(self) -> None:
        """Leave in `rho` an object inside the support and in `error`, `free_llk` what it is worth."""
        if self._previous is not None:
            self.rho[...] = self._previous
            self._previous = None
        self.rho[~self.support] = 0
        self._project(lambda *_: None, 1.0)

    def _accelerated(self) -> None:
        if self._previous is None:
            self.rho[~self.support] = 0
            self._previous = self.rho.copy()
            self._momentum = 1.0
        following = (1 + np.sqrt(1 + 4 * self._momentum**2)) / 2
        momentum = min((self._momentum - 1) / following, 0.9)
        self._momentum = following
        previous = self._previous
        self._transform(self.rho, ANSCOMBE)

        def close(frames: slice) -> None:
            self._inverse(frames)
            accelerate(*self._flat(frames), previous[frames].ravel(), momentum)

        self._all_frames(close)

    # -- passes -------------------------------------------------------------------------------------
    def _project(self, update: Callable[..., None], beta: float, source: np.ndarray | None = None) -> None:
        """Modulus projection of `source` (the iterate by default) into ``psi``, then the update."""
        self._transform(self.rho if source is None else source, 0.0)

        def close(frames: slice) -> None:
            self._inverse(frames)
            update(*self._flat(frames), beta)

        self._all_frames(close)

    def _transform(self, source: np.ndarray, offset: float) -> None:
        """``psi``: moduli of the transform of `source` replaced, the rocking axis already inverted."""

        def forward(frames: slice) -> None:
            if source is not self.psi:
                self.psi[frames] = source[frames]
            _in_place(sp_fft.fft2, self.psi[frames])

        def moduli(rows: slice) -> tuple[float, float]:
            block = np.ascontiguousarray(self.psi[:, rows])
            _in_place(sp_fft.fft, block, axis=0)
            psi, packed = block.ravel(), np.ascontiguousarray(self.packed[:, rows]).ravel()
            free_llk = free_log_likelihood(psi, packed)
            residual = project_modulus(psi, packed, offset)
            _in_place(sp_fft.ifft, block, axis=0)
            self.psi[:, rows] = block
            return residual, free_llk

        self._all_frames(forward)
        residual, free_llk = np.sum(list(self._pool.map(moduli, self._rows)), axis=0)
        self.error = float(np.sqrt(residual / self._total))
        self.free_llk = float(free_llk / self._n_free) if self._n_free else float("nan")

    def _inverse(self, frames: slice) -> None:
        _in_place(sp_fft.ifft2, self.psi[frames])

    def _flat(self, frames: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.rho[frames].ravel(), self.psi[frames].ravel(), self.support[frames].ravel()

    def _all_frames(self, work: Callable[[slice], None]) -> None:
        for _ in self._pool.map(work, self._frames):
            pass


def _portions(count: int, item_bytes: int, cache_bytes: int = 1 << 19) -> list[slice]:
    """Cut `count` items into portions that fit a core's cache."""
    size = max(1, cache_bytes // item_bytes)
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]


def _in_place(transform: Callable[..., Any], a: np.ndarray, **kwargs: int) -> None:
    """Unitary transform of `a` into itself (scipy may, but need not, use the memory it is offered)."""
    out: np.ndarray = transform(a, norm="ortho", overwrite_x=True, workers=1, **kwargs)
    if not np.may_share_memory(out, a):
        a[...] = out
