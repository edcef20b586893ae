"""One frame at a time: coherent modulation imaging of a single rocking angle.

Every frame alone is an overdetermined problem in two dimensions (F. Zhang and J. M. Rodenburg, Phys. Rev. B
82, 121104 (2010)); what it leaves open is one phase.
"""

from __future__ import annotations

import numba
import numpy as np

from bcmi_beamline.reconstruction.modulation.operators import FrameOperator, weigh_rows
from bcmi_beamline.reconstruction.threads import each
from bcmi_beamline.scans import RockingScan

ANSCOMBE = 0.375
"""sqrt(I + 3/8) of a Poisson count has the variance 1/4 whatever its mean."""


def make_targets(scan: RockingScan, free: np.ndarray) -> np.ndarray:
    """Pack counts and what may be done with them into one array, zero frequency at the corner.

    Parameters
    ----------
    scan : RockingScan
    free : ndarray, (J, Ny, Nx), bool
        Free pixels.

    Returns
    -------
    ndarray, (J, Ny, Nx), float32
        ``sqrt(I + 3/8)`` where a pixel is used; -1 where it is bad, saturated or not finite; ``-2 - I`` where
        it is free.
    """
    return _pack(scan, scan.frames, free)


def sentinel_targets(scan: RockingScan) -> np.ndarray:
    """The same for the sentinel frames, (S, Ny, Nx), none of whose pixels is free."""
    assert scan.sentinels is not None, "the scan has no sentinels"
    return _pack(scan, scan.sentinels, np.zeros(scan.sentinels.shape, bool))


def _pack(scan: RockingScan, frames: np.ndarray, free: np.ndarray) -> np.ndarray:
    targets = np.empty(frames.shape, np.float32)
    cutoff = np.inf if scan.count_cutoff is None else float(scan.count_cutoff)
    masks = np.broadcast_to(scan.mask, frames.shape)
    each(lambda j: _pack_frame(frames[j], masks[j], free[j], cutoff, targets[j]), range(len(frames)))
    return targets


_jit = numba.njit(cache=True, nogil=True, fastmath=True, error_model="numpy")


@numba.njit(cache=True, nogil=True, error_model="numpy")  # no fastmath: a frame may hold nan
def _pack_frame(
    frame: np.ndarray, mask: np.ndarray, free: np.ndarray, cutoff: float, out: np.ndarray
) -> None:  # pragma: no cover
    """One frame as `make_targets` says, its middle moved to the corner."""
    ny, nx = out.shape
    zero, offset, limit = np.float32(0), np.float32(0.375), np.float32(cutoff)
    for row in range(ny):
        source = (row + ny // 2) % ny
        for start, stop, at in ((nx // 2, nx, 0), (0, nx // 2, nx - nx // 2)):
            counts, bad, kept = frame[source, start:stop], mask[source, start:stop], free[source, start:stop]
            line = out[row, at : at + stop - start]
            for i in range(stop - start):  # no branches: eight pixels at a time
                seen = np.float32(counts[i])
                root = np.sqrt(max(seen, zero) + offset)
                packed = -2 - seen if kept[i] else root
                line[i] = np.float32(-1) if bad[i] or not (seen >= zero and seen < limit) else packed


def frame_counts(targets: np.ndarray | list[np.ndarray]) -> np.ndarray:
    """Counts in the pixels in use of each frame, (J,)."""
    return np.array(each(lambda t: _sums(t)[0], targets))


def frame_norms(targets: np.ndarray) -> np.ndarray:
    """``sum (I + 3/8)`` of the pixels in use of each frame and how many pixels are free, (J, 2)."""
    return np.array(each(lambda t: _sums(t)[1:], targets))


@_jit
def _sums(target: np.ndarray) -> tuple[float, float, float]:  # pragma: no cover
    """Counts in the pixels in use, ``sum (I + 3/8)`` over them, and the number of free pixels."""
    zero, one = np.float32(0), np.float32(1)
    squares, used, free = 0.0, 0.0, 0.0
    for row in range(target.shape[0]):
        line = target[row]
        sum_line, used_line, free_line = zero, zero, zero
        for column in range(len(line)):
            seen = max(line[column], zero)
            sum_line += seen * seen
            used_line += one if line[column] >= zero else zero
            free_line += one if line[column] <= -2 else zero
        squares, used, free = squares + sum_line, used + used_line, free + free_line
    return squares - ANSCOMBE * used, squares, free  # pyright: ignore[reportReturnType]


@_jit
def _power(wave: np.ndarray, out: np.ndarray) -> None:  # pragma: no cover
    """``|wave|^2`` of one row."""
    for column in range(len(wave)):
        here = wave[column]
        out[column] = here.real * here.real + here.imag * here.imag


@_jit
def _free_part(counts: np.ndarray, target: np.ndarray) -> float:  # pragma: no cover
    """Free log-likelihood of one row."""
    total = 0.0
    for column in range(len(target)):
        if target[column] <= -2:
            seen = -2 - target[column]
            total += counts[column] - seen
            if seen > 0:
                total += seen * np.log(seen / max(counts[column], np.float32(1e-6)))
    return total  # pyright: ignore[reportReturnType]


@_jit
def _factors(
    psi: np.ndarray,
    target: np.ndarray,
    neighbour: float,
    background: float,
    poisson: bool,
    factor: np.ndarray,
) -> tuple[float, float]:  # pragma: no cover
    """Of `modulus_step`: the factor f of every pixel, the misfit and the free log-likelihood.

    Row by row, so that nothing but the wave, the targets and the factors comes from beyond the nearest cache.
    """
    ny, nx = psi.shape
    w, middle, dark = np.float32(neighbour), np.float32(1 - 2 * neighbour), np.float32(background)
    one, zero, half, offset = np.float32(1), np.float32(0), np.float32(0.5), np.float32(0.375)
    power, line = np.empty((3, nx), np.float32), np.empty(nx + 2, np.float32)
    counts = np.empty(nx, np.float32)
    misfit, free = 0.0, 0.0
    _power(psi[ny - 1], power[2])
    _power(psi[0], power[0])
    for row in range(ny):
        above, here, below = power[(row + 2) % 3], power[row % 3], power[(row + 1) % 3]
        _power(psi[(row + 1) % ny], below)
        weigh_rows(above, here, below, neighbour, line)
        for column in range(nx):
            counts[column] = middle * line[column + 1] + w * (line[column] + line[column + 2]) + dark
        seen, out, part = target[row], factor[row], zero
        for column in range(nx):
            used = one if seen[column] >= zero else zero
            expected = counts[column] + offset
            change = used * (seen[column] / np.sqrt(expected) - one)
            part += expected * change * change  # (sqrt(I_c + 3/8) - sqrt(I_o + 3/8))^2 without its root
            out[column] = change
        if poisson:
            for column in range(nx):
                excess = seen[column] * seen[column] / (counts[column] + offset) - one
                out[column] = min(half * excess, one) if seen[column] >= zero else zero
        misfit += part
        free += _free_part(counts, seen)
    return misfit, free  # pyright: ignore[reportReturnType]


@_jit
def modulus_step(
    psi: np.ndarray,
    target: np.ndarray,
    neighbour: float,
    background: float = 0.0,
    poisson: bool = False,
) -> tuple[float, float]:  # pragma: no cover
    """Turn a detector wave into a descent direction, in place.

    The variance-stabilised misfit is ``L = sum (sqrt(I_c + 3/8) - sqrt(I_o + 3/8))^2`` over the pixels in
    use, with I_c the intensity integrated over the pixel, ``I_c = S |psi|^2 + b``. Its descent direction is
    ``-dL/d psi* = psi S^T f`` with ``f = sqrt(I_o + 3/8) / sqrt(I_c + 3/8) - 1``, 0 elsewhere.

    Parameters
    ----------
    psi : ndarray, (Ny, Nx), complex64
    target : ndarray, (Ny, Nx), float32
        From `make_targets`.
    neighbour : float
        Of the stencil S, `integrate_pixels`.
    background : float
        Counts b per pixel that no wave makes.
    poisson : bool
        Step down ``sum (I_c - (I_o + 3/8) log(I_c + 3/8)) / 2``, Poisson's negative log-likelihood of
        ``I + 3/8``: ``f = ((I_o + 3/8) / (I_c + 3/8) - 1) / 2``, at most 1. Near the counts it is the same
        step; it does not underrate few counts, of which the square root is no longer stable.

    Returns
    -------
    misfit, free : float
        Misfit L, variance-stabilised, and the free log-likelihood summed over the free pixels.
    """
    ny, nx = psi.shape
    w, middle = np.float32(neighbour), np.float32(1 - 2 * neighbour)
    factor, line = np.empty((ny, nx), np.float32), np.empty(nx + 2, np.float32)
    misfit, free = _factors(psi, target, neighbour, background, poisson, factor)
    for row in range(ny):
        weigh_rows(factor[(row - 1) % ny], factor[row], factor[(row + 1) % ny], neighbour, line)
        here = psi[row]
        for column in range(nx):
            change = middle * line[column + 1] + w * (line[column] + line[column + 2])
            here[column] = complex(here[column].real * change, here[column].imag * change)
    return misfit, free


def descend(
    operator: FrameOperator,
    wave: np.ndarray,
    target: np.ndarray,
    frame: int,
    shift: np.ndarray | None = None,
    poisson: bool = False,
) -> tuple[np.ndarray, float, float]:
    """Descent step at one exit wave (ny, nx), and the sums of `modulus_step`.

    The length of the step is stable: one over the most light that the modulator passes anywhere, which is
    1 but for a map that rings.
    """
    psi = operator.forward(wave, frame, shift)
    misfit, free = modulus_step(psi, target, operator.neighbour, operator.background, poisson)
    return operator.step * operator.adjoint(psi, frame, shift), misfit, free


def descend_together(
    operator: FrameOperator,
    waves: np.ndarray,
    target: np.ndarray,
    frame: int,
    shift: np.ndarray | None = None,
    poisson: bool = False,
) -> tuple[np.ndarray, float, float]:
    """As `descend`, for exit waves (n, ny, nx) whose intensities add up, ``I_c = S sum_n |psi_n|^2 + b``.

    Every wave is multiplied by the same ``S^T f``: what `modulus_step` makes of a wave of their intensity.
    """
    psi = np.stack([operator.forward(wave, frame, shift) for wave in waves])
    modulus = np.sqrt((np.real(psi) ** 2 + np.imag(psi) ** 2).sum(axis=0) + np.finfo(np.float32).tiny)
    all_in_one = modulus.astype(np.complex64)
    misfit, free = modulus_step(all_in_one, target, operator.neighbour, operator.background, poisson)
    psi *= np.real(all_in_one) / modulus
    ways = [operator.adjoint(one, frame, shift) for one in psi]
    return operator.step * np.stack(ways), misfit, free


@_jit
def _curvature(psi: np.ndarray, ahead: np.ndarray, target: np.ndarray) -> float:  # pragma: no cover
    """Second derivative of the misfit along `ahead`, after Gauss and Newton, the pixels taken as points."""
    offset, zero = np.float32(0.375), np.float32(0)
    total = 0.0
    for row in range(target.shape[0]):
        here, there, seen = psi[row], ahead[row], target[row]
        line = zero
        for i in range(len(seen)):
            power = here[i].real * here[i].real + here[i].imag * here[i].imag + offset
            slope = here[i].real * there[i].real + here[i].imag * there[i].imag
            line += slope * slope / power if seen[i] >= zero else zero
        total += line
    return 2 * total  # pyright: ignore[reportReturnType]


@_jit
def _advance(psi: np.ndarray, ahead: np.ndarray, step: float, copy: np.ndarray) -> None:  # pragma: no cover
    """``psi += step ahead``, and a copy of it."""
    length = np.float32(step)
    for row in range(len(psi)):
        here, there, out = psi[row], ahead[row], copy[row]
        for i in range(len(here)):
            here[i] = complex(here[i].real + length * there[i].real, here[i].imag + length * there[i].imag)
            out[i] = here[i]


def solve_wave(
    operator: FrameOperator,
    wave: np.ndarray,
    target: np.ndarray,
    frame: int,
    steps: int,
    settled: float = 0.003,
    inside: np.ndarray | None = None,
) -> tuple[np.ndarray, float]:
    """Improve one exit wave (ny, nx) by conjugate gradients on its own frame.

    Directions after E. Polak and G. Ribiere; the detector wave is linear in the exit wave, so that the length
    of a step after Gauss and Newton costs no further transform. Two transforms a step, as for `descend`.

    Parameters
    ----------
    operator : FrameOperator
    wave : ndarray, (ny, nx)
        Start.
    target : ndarray, (Ny, Nx)
        From `make_targets`.
    frame : int
    steps : int
        At most.
    settled : float
        Stop when a step lowered the misfit by less than this part.
    inside : ndarray, (ny, nx), bool, optional
        Support.

    Returns
    -------
    wave : ndarray
    misfit : float
        Before the last step.
    """
    psi = operator.forward(wave, frame)
    turned, ahead = psi.copy(), np.empty_like(psi)
    way, before, power, last = np.zeros_like(wave), np.zeros_like(wave), 1.0, np.inf
    misfit = 0.0
    for _ in range(steps):
        misfit, _ = modulus_step(turned, target, operator.neighbour, operator.background)
        if misfit > (1 - settled) * last:
            break
        last = misfit
        gradient = operator.adjoint(turned, frame)
        if inside is not None:
            gradient *= inside
        kept = float(np.vdot(gradient - before, gradient).real) / power
        way = gradient + np.float32(max(kept, 0)) * way
        before, power = gradient, max(float(np.vdot(gradient, gradient).real), 1e-30)
        operator.forward(way, frame, out=ahead)
        slope, curvature = 2 * float(np.vdot(way, gradient).real), _curvature(psi, ahead, target)
        if not curvature > 0:
            break
        wave = wave + np.float32(slope / curvature) * way
        _advance(psi, ahead, slope / curvature, turned)
    return wave, misfit


def scale_to_counts(operator: FrameOperator, wave: np.ndarray, target: np.ndarray, frame: int) -> np.ndarray:
    """Give an exit wave the counts of its frame."""
    used = target >= 0
    model = operator.intensity(operator.forward(wave, frame))[used].sum(dtype=float)
    seen = (target[used] ** 2 - np.float32(ANSCOMBE)).sum(dtype=float)
    return wave * np.float32(np.sqrt(max(seen, 0) / max(model, 1e-12)))


def reflect_from_noise(
    operator: FrameOperator,
    target: np.ndarray,
    frame: int,
    rng: np.random.Generator,
    region: np.ndarray,
    steps: int,
    relaxation: float = 0.99,
) -> tuple[np.ndarray, float]:
    """Exit wave of a frame from noise: reflections, then descent.

    Relaxed averaged alternating reflections (D. R. Luke, Inverse Problems 21, 37 (2005)) between the
    measured moduli and the waves that the window can send to the detector. Descent alone stagnates on
    every other start.

    Parameters
    ----------
    operator : FrameOperator
    target : ndarray, (Ny, Nx)
        From `make_targets`.
    frame : int
        Its index in the scan.
    rng : Generator
    region : ndarray, (ny, nx), bool
        In-plane support.
    steps : int
    relaxation : float
        Luke's beta.

    Returns
    -------
    wave : ndarray, (ny, nx), complex64
    misfit : float
    """
    noise = rng.normal(size=(*region.shape, 2)).astype(np.float32).view(np.complex64)[..., 0]
    psi = operator.forward(scale_to_counts(operator, noise * region, target, frame), frame)
    beta = np.float32(relaxation)
    for _ in range(steps):
        change = psi.copy()
        modulus_step(
            change, target, operator.neighbour, operator.background
        )  # P_B psi = psi + change, P_B the moduli
        reflected = psi + 2 * change
        sent = operator.forward(operator.inverse(reflected, frame, regularisation=0.01) * region, frame)
        psi += (1 - 2 * beta) * change + beta * (sent - psi)  # sent: P_A, the window
    return solve_wave(operator, operator.inverse(psi, frame) * region, target, frame, 40, inside=region)


def solve_from_noise(
    operator: FrameOperator,
    target: np.ndarray,
    frame: int,
    rng: np.random.Generator,
    inside: np.ndarray | None = None,
    steps: int = 150,
    rounds: int = 4,
) -> tuple[np.ndarray, float]:
    """Exit wave of one frame, with nothing known but the modulator and the window.

    Starts two at a time from noise until the two that fit best agree: failures all differ.

    Parameters
    ----------
    operator : FrameOperator
    target : ndarray, (Ny, Nx)
        From `make_targets`.
    frame : int
        Its index in the scan.
    rng : Generator
    inside : ndarray, (ny, nx), bool, optional
        In-plane support.
    steps : int
        Reflections of each start.
    rounds : int
        Pairs of starts at most.

    Returns
    -------
    wave : ndarray, (ny, nx), complex64
    misfit : float
        Misfit per pixel in use of the best start; 1/4 is what photon noise alone gives.
    """
    region = np.ones(operator.window.shape, bool) if inside is None else inside
    tried: list[tuple[float, np.ndarray]] = []

    def attempt(own: np.random.Generator) -> tuple[float, np.ndarray]:
        wave, misfit = reflect_from_noise(operator, target, frame, own, region, steps)
        return misfit, wave

    for _ in range(rounds):
        tried = sorted([*tried, *each(attempt, rng.spawn(2))], key=lambda t: t[0])
        a, b = tried[0][1], tried[1][1]
        if abs(np.vdot(a, b)) > 0.9 * np.linalg.norm(a) * np.linalg.norm(b):
            break
    misfit, wave = tried[0]
    return wave, misfit / int((target >= 0).sum())
