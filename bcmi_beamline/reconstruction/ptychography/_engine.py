"""Far-field ptychography: mixed-mode probe, sub-pixel positions, minibatches and an accelerated finish."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bcmi_beamline.reconstruction.fourier import fft2, ifft2
from bcmi_beamline.reconstruction.ptychography import _kernels as kernels


@dataclass
class Score:
    """Fit of one pass over the frames.

    Parameters
    ----------
    r2 : float
        ``sum (|F| - sqrt(I))**2 / sum I`` over the used pixels.
    free_llk : float
        Mean negative Poisson log-likelihood over the free pixels, 0 for a perfect noise-free model.
    """

    r2: float
    free_llk: float


class Engine:
    """State of a reconstruction, and the steps that improve it.

    The model of frame j is ``|FFT2(T(s_j) probe_m * image[window j])|**2`` summed over modes: the window starts at
    the whole pixel nearest to the frame's offset, and the probe is shifted by what is left, in Fourier space.

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
        The scanned object; every window must fit, with `margin` pixels around.
    flux : ndarray, (J,)
        Counts of frame j are divided by this.
    rng : Generator
    batch : int
        Frames per update.
    """

    def __init__(self, frames, states, offsets, probe, image, flux, rng, batch=8):
        self.frames, self.states, self.flux = frames, states, flux.astype(np.float32)
        self.offsets = offsets.astype(float).copy()
        self.probe = probe.astype(np.complex64)
        self.image = image.astype(np.complex64)
        self.rng, self.batch = rng, batch
        self.subpixel = True
        self.position_step = np.zeros_like(self.offsets)
        self._start = self.offsets.copy()
        centred = self._start - self._start.mean(axis=0)
        self._affine = np.linalg.qr(np.column_stack([np.ones(len(centred)), centred]))[0]
        ny, nx = frames.shape[1:]
        self._fy, self._fx = np.fft.fftfreq(ny), np.fft.fftfreq(nx)

    # -- one batch --------------------------------------------------------------------------------
    def _windows(self, index):
        """Whole-pixel corners (b, 2) and the ramps that shift the probe by the remainder."""
        corners = np.rint(self.offsets[index]).astype(np.intp)
        rest = self.offsets[index] - corners
        ramp_y = np.exp(-2j * np.pi * rest[:, :1] * self._fy).astype(np.complex64)
        ramp_x = np.exp(-2j * np.pi * rest[:, 1:] * self._fx).astype(np.complex64)
        return corners, ramp_y, ramp_x

    def _residuals(self, index, corners, probes):
        """Exit-wave residuals of a batch, (b, modes, Ny, Nx), and the sums that score it."""
        waves = np.empty((len(index), *self.probe.shape), np.complex64)
        kernels.exit_waves(probes, self.image, corners, waves)
        waves = fft2(waves, overwrite=True)
        sums = np.zeros((len(index), 5))
        kernels.modulus_residual(waves, self.frames, index, self.flux, self.states, sums)
        return ifft2(waves, overwrite=True), sums

    def _shifted_probes(self, spectrum, ramp_y, ramp_x):
        if not self.subpixel:
            shape = (len(ramp_y), *self.probe.shape)
            return np.broadcast_to(self.probe, shape)
        probes = np.empty((len(ramp_y), *self.probe.shape), np.complex64)
        kernels.shift_spectrum(spectrum, ramp_y, ramp_x, probes)
        return ifft2(probes, overwrite=True)

    def _gradients(self, index, grad_image, illumination, grad_probe, power, positions):
        """Add the gradients of a batch to the accumulators; return its score sums.

        `grad_probe` is a spectrum when sub-pixel shifts are on, a wave when they are off.
        """
        corners, ramp_y, ramp_x = self._windows(index)
        spectrum = fft2(self.probe) if self.subpixel else self.probe
        probes = self._shifted_probes(spectrum, ramp_y, ramp_x)
        residuals, sums = self._residuals(index, corners, probes)
        kernels.object_gradient(residuals, probes, corners, grad_image, illumination)
        if positions:
            normal = np.zeros((len(index), 5))
            kernels.position_gradient(residuals, probes, self.image, corners, normal)
            self._note_positions(index, normal)
        kernels.probe_gradient(residuals, self.image, corners, power)
        if self.subpixel:
            kernels.unshift_sum(fft2(residuals, overwrite=True), ramp_y, ramp_x, grad_probe)
        else:
            grad_probe += residuals.sum(axis=0)
        return sums

    def _note_positions(self, index, normal):
        """Gauss-Newton step of every frame's offset, damped where the object is flat."""
        yy, yx, xx, ry, rx = normal.T
        damp = 0.05 * (yy + xx) + 1e-12
        yy, xx = yy + damp, xx + damp
        determinant = yy * xx - yx**2
        step = np.stack([xx * ry - yx * rx, yy * rx - yx * ry], axis=1) / determinant[:, None]
        self.position_step[index] = step

    def _accumulators(self):
        real = np.zeros(self.image.shape, np.float32)
        power = np.zeros(self.probe.shape[1:], np.float32)
        return np.zeros_like(self.image), real, np.zeros_like(self.probe), power

    # -- passes over all frames -------------------------------------------------------------------
    def sweep(self, *, damp_image=0.1, damp_probe=0.3, update_probe=True, positions=False):
        """Minibatches in random order, rPIE steps: `damp` 1 is ePIE, small is bold."""
        order = self.rng.permutation(len(self.frames))
        totals = np.zeros(5)
        for start in range(0, len(order), self.batch):
            index = order[start : start + self.batch]
            gi, wi, gp, wp = self._accumulators()
            totals += self._gradients(index, gi, wi, gp, wp, positions).sum(axis=0)
            peak = (np.abs(self.probe) ** 2).sum(axis=0).max()
            self.image += gi / ((1 - damp_image) * wi + damp_image * peak)
            if update_probe:
                if self.subpixel:
                    gp = ifft2(gp, overwrite=True)
                self.probe += gp / ((1 - damp_probe) * wp + damp_probe * wp.max())
        return self._score(totals)

    def _score(self, totals):
        error, counted, _, llk, free = totals
        return Score(error / max(counted, 1e-30), llk / free if free else float("nan"))

    def move(self, limit, gain=1.5, reach=0.3):
        """Take the Gauss-Newton steps noted in the last pass, less what they cannot know.

        A common shift, magnification, rotation or shear of all positions can be undone by the object and is
        left to the encoders: it is projected out of the whole correction. `reach` (pixels) bounds a step.
        """
        moved = self.offsets + gain * np.clip(self.position_step, -reach, reach) - self._start
        moved -= self._affine @ (self._affine.T @ moved)
        self.offsets = limit(self._start + moved)

    def orthogonalise(self):
        """Turn the probe modes into orthogonal ones of falling power; the intensities stay as they are."""
        if len(self.probe) > 1:
            flat = self.probe.reshape(len(self.probe), -1)
            _, vectors = np.linalg.eigh(flat.conj() @ flat.T)
            self.probe = (vectors.T[::-1] @ flat).reshape(self.probe.shape).astype(np.complex64)

    def illumination(self):
        """Sum over frames of ``|probe|**2`` on the object, (H, W), float32."""
        total = np.zeros(self.image.shape, np.float32)
        power = (np.abs(self.probe) ** 2).sum(axis=0)
        ny, nx = power.shape
        for row, column in np.rint(self.offsets).astype(int):
            total[row : row + ny, column : column + nx] += power
        return total
