"""Far-field ptychography with mixed probe modes and sub-pixel positions."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from bcmi_beamline.reconstruction.fourier import WORKERS, fft2, ifft2
from bcmi_beamline.reconstruction.ptychography import _kernels as kernels


class Score(NamedTuple):
    """Fit of one pass over the frames."""

    r2: float
    """``sum (|F| - sqrt(I))**2 / sum I`` over the used pixels."""
    free_llk: float
    """Mean negative Poisson log-likelihood over the free pixels; nan where none are free."""


@dataclass
class _Batch:
    """What the frames of a batch leave: (b, modes, Ny, Nx) waves, and their sums."""

    probes: np.ndarray
    residuals: np.ndarray
    sums: np.ndarray
    normal: np.ndarray | None = None


def _run(pool: ThreadPoolExecutor, jobs: list[tuple]) -> None:
    """Call every (function, argument, ...) in the threads of `pool`, the last one here."""
    others = [pool.submit(*job) for job in jobs[:-1]]
    jobs[-1][0](*jobs[-1][1:])
    for other in others:
        other.result()


class Engine:
    """State of a reconstruction, and the steps that improve it.

    The model of frame j is ``|FFT2(T(s_j) probe_m * image[window j])|**2`` summed over modes: the window
    starts at the whole pixel nearest to the frame's offset, and the probe is shifted by what is left, in
    Fourier space. A batch is made of frames whose remainders are alike: they share one shift and its
    derivatives, exact to second order in what is left (a twelfth of a pixel), so that shifts are cheap.

    Parameters
    ----------
    frames : ndarray, (J, Ny, Nx)
        Counts, zero frequency at ``n // 2``; any real dtype, never copied.
    states : ndarray, (K, Ny, Nx), uint8
        0 for a pixel to use, `kernels.MASKED`, `kernels.FREE`; frame j takes set ``j % K``.
    offsets : ndarray, (J, 2)
        Corner (row, column) of every window on the object, pixels, not whole.
    probe : ndarray, (modes, Ny, Nx), complex64
    image : ndarray, (H, W), complex64
        The scanned object; every window must fit with half a pixel to spare.
    flux : ndarray, (J,)
        Counts of frame j are divided by this.
    rng : Generator
    batch : int
        Frames per update.
    """

    def __init__(
        self,
        frames: np.ndarray,
        states: np.ndarray,
        offsets: np.ndarray,
        probe: np.ndarray,
        image: np.ndarray,
        flux: np.ndarray,
        rng: np.random.Generator,
        batch: int = 8,
    ) -> None:
        self.frames, self.states, self.flux = frames, states, flux.astype(np.float32)
        self.offsets = offsets.astype(float)
        self.probe, self.image = probe.astype(np.complex64), image.astype(np.complex64)
        self.rng, self.batch = rng, batch
        self._threads = ThreadPoolExecutor(WORKERS)
        self._image_sum = np.zeros_like(self.image)
        self._light_sum = np.zeros(image.shape, np.float32)
        self._probe_sum = np.zeros_like(self.probe)
        self._power_sum = np.zeros(probe.shape[-2:], np.float32)
        self._steps = np.zeros_like(self.offsets)
        self._previous: tuple[np.ndarray, np.ndarray] | None = None
        self._last_r2, self._age = np.inf, 0
        self._start = self.offsets.copy()
        centred = self._start - self._start.mean(axis=0)
        self._affine = np.linalg.qr(np.column_stack([np.ones(len(centred)), centred]))[0]
        self._fy, self._fx = (np.fft.fftfreq(n) for n in probe.shape[-2:])
        self._derivatives = np.ones((3, 1, *probe.shape[-2:]), np.complex64)
        self._derivatives[1] = -2j * np.pi * self._fy[:, None]
        self._derivatives[2] = -2j * np.pi * self._fx

    # -- one batch --------------------------------------------------------------------------------
    def _batches(self, frames: np.ndarray | None = None) -> list[np.ndarray]:
        """All frames, or those given, in random groups whose offsets differ by whole pixels, nearly."""
        order = self.rng.permutation(len(self.frames) if frames is None else frames)
        cells = int(np.clip(np.sqrt(len(order) / self.batch), 6, 16))
        row, column = np.floor(cells * ((self.offsets[order] + self.rng.uniform(0, 1, 2)) % 1)).astype(int).T
        cell = row * cells + column
        order = order[np.argsort(cell, kind="stable")]
        groups = np.split(order, np.cumsum(np.bincount(cell))[:-1])
        batches = [b for g in groups if len(g) for b in np.array_split(g, -(-len(g) // self.batch))]
        return [batches[k] for k in self.rng.permutation(len(batches))]

    def _place(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Whole-pixel corners (b, 2), the shift (2,) that a batch shares, and what is left to each (b, 2)."""
        offsets = self.offsets[index]
        # the mean of remainders is taken on a circle: 0.49 and -0.49 are neighbours
        common = np.angle(np.exp(2j * np.pi * offsets).mean(axis=0)) / (2 * np.pi)
        corners = np.rint(offsets - common)
        return corners.astype(np.intp), common, (offsets - corners - common).astype(np.float32)

    def _moving(self, shift: np.ndarray) -> np.ndarray:
        """Fourier factors (3, 1, Ny, Nx) that shift a probe, and that of its derivatives by the shift."""
        y, x = (np.exp(-2j * np.pi * s * f) for s, f in zip(shift, (self._fy, self._fx), strict=True))
        return self._derivatives * (y[:, None] * x).astype(np.complex64)

    def _frames(self, part: slice, index, corners, rest, base, out: _Batch) -> None:
        """Probes, exit-wave residuals, scores and positions of some frames of a batch, in one thread."""
        corners, probes, residuals = corners[part], out.probes[part], out.residuals[part]
        kernels.spread_shifts(base, rest[part], probes)
        kernels.exit_waves(probes, self.image, corners, residuals)
        waves = fft2(residuals, workers=1)
        which = index[part]
        counts = self.frames[which].astype(np.float32) / self.flux[which, None, None]
        kernels.modulus_residual(waves, counts, self.states[which % len(self.states)], out.sums[part])
        residuals[:] = ifft2(waves, overwrite=True, workers=1)
        if out.normal is not None:
            kernels.position_gradient(residuals, probes, self.image, corners, out.normal[part])

    def _gradient(self, index, locate: bool) -> np.ndarray:
        """Add what one batch asks of image and probe to their sums; returns the sums that score it."""
        corners, common, rest = self._place(index)
        moving = self._moving(common)
        base = ifft2(fft2(self.probe) * moving, overwrite=True)
        shape = (len(index), *self.probe.shape)
        out = _Batch(np.empty(shape, np.complex64), np.empty(shape, np.complex64), np.zeros((len(index), 4)))
        if locate:
            out.normal = np.zeros((len(index), 5))
        parts = [slice(s[0], s[-1] + 1) for s in np.array_split(range(len(index)), WORKERS) if len(s)]
        _run(self._threads, [(self._frames, part, index, corners, rest, base, out) for part in parts])
        if out.normal is not None:
            self._steps[index] = _newton(out.normal)
        gradient = np.zeros_like(base)
        _run(self._threads, [
            (kernels.object_gradient, out.residuals, out.probes, corners, self._image_sum, self._light_sum),
            (kernels.probe_gradient, out.residuals, self.image, corners, rest, gradient, self._power_sum),
        ])  # fmt: skip
        self._probe_sum += (fft2(gradient, overwrite=True) * moving.conj()).sum(axis=0)
        return out.sums.sum(axis=0)

    def _update(self, damp_image: float, damp_probe: float, step: float) -> None:
        """Move image and probe by `step` times their sums over what lit them, and empty the sums."""
        floor = damp_image * self._light_sum.max()
        kernels.object_step(self.image, self._image_sum, self._light_sum, step, 1 - damp_image, floor)
        light = (1 - damp_probe) * self._power_sum + damp_probe * self._power_sum.max()
        self.probe += step * ifft2(self._probe_sum) / light
        self._probe_sum[:] = 0
        self._power_sum[:] = 0

    # -- all frames -------------------------------------------------------------------------------
    def sweep(
        self,
        *,
        damp_image: float = 0.2,
        damp_probe: float = 0.3,
        momentum: float = 0.0,
        locate: bool = False,
    ) -> Score:
        """Pass over all frames in random batches with rPIE steps: fast from afar, noisy at the end.

        Maiden, Johnson and Li, Optica 4, 736 (2017), Eqs. 18-19, summed over a batch.

        Parameters
        ----------
        damp_image, damp_probe : float, 0 to 1
            1 is ePIE; less takes bolder steps where little light falls.
        momentum : float
            Go on by this share of what the pass has changed: slow modes, which do not alternate, get
            ``1 / (1 - momentum)`` times further.
        locate : bool
            Note where each frame would fit better, for `move`.
        """
        totals = np.zeros(4)
        image, probe = self.image.copy(), self.probe.copy()
        for index in self._batches():
            totals += self._gradient(index, locate)
            self._update(damp_image, damp_probe, 1.0)
        if momentum:
            self.image += np.float32(momentum) * (self.image - image)
            self.probe += np.float32(momentum) * (self.probe - probe)
        self._previous = None
        return _score(totals)

    def descend(self, *, step: float = 0.6, damp: float = 0.002, locate: bool = False) -> Score:
        """One accelerated step of image and probe down the gradient of all frames: for the finish.

        Nesterov's momentum with a restart where the fit gets worse (O'Donoghue and Candes, Found. Comput.
        Math. 15, 715 (2015)); the gradient is divided by the light, as in `sweep`. Half a step for each of
        two factors of one product never overshoots; a little more is safe since they hardly agree.
        """
        totals = np.sum([self._gradient(index, locate) for index in self._batches()], axis=0)
        score = _score(totals)
        if self._previous is None or score.r2 > self._last_r2:
            self._age, self._previous = 0, (self.image.copy(), self.probe.copy())
        self._last_r2 = score.r2
        self._update(damp, damp, step)
        momentum = min(self._age / (self._age + 3), 0.98)
        self._age += 1
        stepped = self.image.copy(), self.probe.copy()
        self.image += np.float32(momentum) * (stepped[0] - self._previous[0])
        self.probe += np.float32(momentum) * (stepped[1] - self._previous[1])
        self._previous = stepped
        return score

    def probe_from(self, index: np.ndarray) -> np.ndarray:
        """Probe that frames `index` alone ask for, one step from the common one; changes nothing."""
        for batch in self._batches(index):
            self._gradient(batch, locate=False)
        light = self._power_sum + 1e-3 * self._power_sum.max()
        probe = self.probe + ifft2(self._probe_sum) / light
        for total in (self._image_sum, self._light_sum, self._probe_sum, self._power_sum):
            total[:] = 0
        return probe

    def move(self, limit: Callable[[np.ndarray], np.ndarray], gain: float = 1.5, reach: float = 0.3) -> None:
        """Move the frames to where the last pass would have them, less what it cannot know.

        A common shift, magnification, rotation or shear of all positions can be undone by the object and is
        left to the encoders: it is projected out of the whole correction. `reach` (pixels) bounds a step.
        """
        moved = self.offsets + gain * np.clip(self._steps, -reach, reach) - self._start
        moved -= self._affine @ (self._affine.T @ moved)
        self.offsets = limit(self._start + moved)

    def orthogonalise(self) -> None:
        """Turn the probe modes into orthogonal ones of falling power; the intensities stay as they are."""
        if len(self.probe) > 1:
            flat = self.probe.reshape(len(self.probe), -1)
            _, vectors = np.linalg.eigh(flat.conj() @ flat.T)
            self.probe = (vectors.T[::-1] @ flat).reshape(self.probe.shape).astype(np.complex64)

    def illumination(self) -> np.ndarray:
        """Sum over frames of ``|probe|**2`` on the object, (H, W), float32."""
        total = np.zeros(self.image.shape, np.float32)
        power = (np.abs(self.probe) ** 2).sum(axis=0)
        ny, nx = power.shape
        for row, column in np.rint(self.offsets).astype(int):
            total[row : row + ny, column : column + nx] += power
        return total


def _score(totals: np.ndarray) -> Score:
    error, counted, llk, free = totals
    return Score(error / counted, llk / free if free else float("nan"))


def _newton(normal: np.ndarray) -> np.ndarray:
    """Gauss-Newton steps (b, 2) of the offsets, damped where the object is flat."""
    yy, yx, xx, ry, rx = normal.T
    damp = 0.05 * (yy + xx) + 1e-30
    yy, xx = yy + damp, xx + damp
    return np.stack([xx * ry - yx * rx, yy * rx - yx * ry], axis=1) / (yy * xx - yx**2)[:, None]
