"""Where the crystal can be: in the plane from the calibration's beam, along zeta from the rocking curve."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy import ndimage

from bcmi_beamline.reconstruction.alignment import resample_support
from bcmi_beamline.reconstruction.modulation.operators import (
    FrameOperator,
    RockingOperator,
    Window,
    sinc_matrix,
)
from bcmi_beamline.scans import Modulator, Reconstruction

SPECK = 0.02
"""A part of a wave that lies apart and has less than this part of the light of the brightest is noise."""

GROWN = 3
"""Voxels by which the support of another result is grown: the crystal's place is known to a few."""


def thickness_from_counts(counts: np.ndarray, kappa: np.ndarray) -> float:
    """Longest chord of the crystal along z', m, from the counts of each frame.

    The transform of the counts over kappa is the autocorrelation of the crystal along z', summed over the
    columns; it ends at the longest chord. Strain makes it cross zero earlier, so that its end is the last
    lag that stands out: of the noise seen at the largest lags, and of 0.1 % of its value at lag 0.

    Parameters
    ----------
    counts : ndarray, (J,)
        Relative to the incident flux.
    kappa : ndarray, (J,)
        rad/m.
    """
    order = np.argsort(kappa)
    widths = np.gradient(kappa[order])
    # a smooth window: else the truncated wings of the rocking curve ring beyond the true end
    taper = np.cos(np.pi / 2 * np.linspace(-1, 1, len(kappa) + 2)[1:-1]) ** 2
    lags = np.linspace(0, np.pi / widths.mean(), 2 * len(kappa))  # to half the field of view
    signal = counts[order] * widths * taper
    correlation = np.abs(np.exp(1j * np.multiply.outer(lags, kappa[order])) @ signal)
    correlation /= correlation[0]
    noise = np.median(correlation[-len(lags) // 4 :])
    return float(lags[correlation > np.clip(4 * noise, 0.001, 0.005)][-1])


def beam_at_crystal(modulator: Modulator, operator: FrameOperator, frame: int) -> np.ndarray:
    """Carry the calibrated beam back from the modulator: the exit wave of `frame`, (ny, nx)."""
    sides = []
    for axis, (n, p) in enumerate(zip(modulator.probe.shape[1:], operator.pixel, strict=True)):
        source = (np.arange(n) - n // 2) * modulator.pixel_size
        sides.append(sinc_matrix(operator.patch_indices(frame, axis) * p, source))
    beam = sides[0] @ modulator.probe[0] @ sides[1].T
    return operator.from_modulator(beam.astype(np.complex64), frame)


def window_around(
    wave: np.ndarray, loose: Window, threshold: float = 0.15, margin: float = 0.35
) -> tuple[Window, bool]:
    """The smallest even window that holds a wave, given on `loose`, with `margin` of its size all around.

    Specks of noise beside it do not count.

    Returns
    -------
    window : Window
    whole : bool
        False where the wave reaches the edge of `loose`, and may go on beyond it.
    """
    inside = ndimage.gaussian_filter(np.abs(wave), 0.7)
    inside = np.where(inside > threshold * inside.max(), inside, 0)
    speck = np.zeros(wave.shape, int)
    ndimage.label(inside, np.ones((3, 3)), output=speck)
    light = np.bincount(speck.ravel(), inside.ravel() ** 2)
    inside = (light > SPECK * light.max())[speck]
    shape, centre, whole = [], [], True
    for axis in (0, 1):
        hit = np.flatnonzero(inside.any(axis=1 - axis))
        whole &= bool(hit[0] > 0 and hit[-1] < loose.shape[axis] - 1)
        at = loose.indices(axis)[hit]
        centre.append(int(np.rint((at[0] + at[-1]) / 2)))
        size = (at[-1] - at[0] + 1) * (1 + 2 * margin) + 4
        shape.append(2 * int(np.ceil(size / 2)))
    return Window((shape[0], shape[1]), (centre[0], centre[1])), whole


def sheared_box(
    rocking: RockingOperator, n_zeta: int, thickness: float, inside: np.ndarray | None = None
) -> np.ndarray:
    """Support ``|z'| <= thickness / 2`` in the sheared frame, (n_zeta, ny, nx) bool."""
    depth = rocking.zeta(n_zeta)[:, None, None] + rocking.shear_offset
    box = np.abs(depth) <= thickness / 2
    return box if inside is None else box & inside


def region_from(
    result: Reconstruction, voxel_size: tuple[float, float, float], shear: tuple[float, float]
) -> np.ndarray:
    """The support of another result of the crystal, grown a little, in the middle of a grid that holds it.

    Parameters
    ----------
    result : Reconstruction
        On any grid; the crystal may stand anywhere in it.
    voxel_size : (zeta, y, x)
        Of the new grid, m.
    shear : (shear_x, shear_y)
        Of the new grid.

    Returns
    -------
    region : ndarray, (n_zeta, ny, nx), bool

    Raises
    ------
    ValueError
        When the support is empty.
    """
    if not result.support.any():
        raise ValueError("the support that was given is empty: give a result that holds a crystal")
    box = ndimage.find_objects(result.support.astype(np.int8))[0]
    alone = replace(result, image=result.image[box], support=result.support[box])
    size = np.array(alone.support.shape) * result.voxel_size
    turned = np.subtract(shear, result.shear)
    size[0] += np.abs(turned) @ size[:0:-1]
    n = 2 * (np.ceil(size / voxel_size / 2).astype(int) + 1 + GROWN)
    region = resample_support(alone, voxel_size, (n[0], n[1], n[2]), shear)
    return ndimage.binary_dilation(region, iterations=GROWN)


def shrink_wrap(image: np.ndarray, region: np.ndarray, threshold: float, smooth: float = 1.0) -> np.ndarray:
    """Support where the smoothed modulus exceeds `threshold` of its 97th percentile in `region`.

    S. Marchesini et al., Phys. Rev. B 68, 140101(R) (2003). It can grow again, within `region`.
    """
    modulus = ndimage.gaussian_filter(np.abs(image), smooth)
    return region & (modulus > threshold * np.percentile(modulus[region], 97))
