"""Frames that share an object move together, and the object with them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from bcmi_beamline.reconstruction.ptychography._positions import Together

N = 24


def scene(frames: int = 300, extent: int = 120):
    """Object with features of some pixels, a narrow beam, and windows all over in the order of a spiral."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:N, :N] - N / 2
    probe = np.exp(-(x**2 + y**2) / 40 + 0.02j * x * y)
    k = np.arange(frames)
    radius, angle = np.sqrt((k + 0.5) / frames) * extent / 2, 2.399963 * k
    corners = np.rint(np.column_stack([radius * np.sin(angle), radius * np.cos(angle)])).astype(int)
    corners += extent // 2 + 4
    noise = ndimage.gaussian_filter(rng.standard_normal((2, extent + N + 8, extent + N + 8)), (0, 2, 2))
    image = 1 + (noise[0] + 1j * noise[1]) / noise.std() / 3
    return image, probe, corners


def normal_equations(image, probe, corners, moves):
    """Curvature of the misfit of exit waves along moves of positions with the object as free as it likes.

    By dense least squares over the pixels that are lit: what `Together` does without ever building it.
    """
    slope = np.stack([0.5 * (np.roll(image, -1, a) - np.roll(image, 1, a)) for a in (0, 1)])
    light, asked, total = np.zeros(image.shape), np.zeros(image.shape, complex), 0.0
    for (row, column), move in zip(corners, moves, strict=True):
        at = slice(row, row + N), slice(column, column + N)
        change = np.tensordot(move, slope[(slice(None), *at)], 1)
        power = np.abs(probe) ** 2
        light[at] += power
        asked[at] += power * change
        total += (power * np.abs(change) ** 2).sum()
    return total - (np.abs(asked) ** 2 / (light + 1e-12)).sum()


def smooth_drift(count: int) -> np.ndarray:
    return np.outer(np.linspace(-1, 1, count), [0.4, -0.2])


def test_a_smooth_field_of_moves_is_hardly_held():
    """What holds the frames, by the map of cells, is that of dense least squares with the object set free."""
    image, probe, corners = scene()
    frames = Together(image, np.abs(probe) ** 2, corners, np.ones(len(corners)))
    random = np.random.default_rng(1).normal(0, 0.3, (len(corners), 2))
    for moves, accuracy in ((smooth_drift(len(corners)), 0.25), (random, 0.1)):
        found = float((moves * frames.hold(moves)).sum())
        assert found == pytest.approx(normal_equations(image, probe, corners, moves), rel=accuracy)
    drift = smooth_drift(len(corners))
    alone = (drift * frames.hold(drift, shared=False)).sum()
    assert (drift * frames.hold(drift)).sum() < 0.1 * alone


def test_drift_and_single_errors_come_home_in_one_step():
    """From the gradient that a wrong drift and random errors leave once the object has settled to them."""
    image, probe, corners = scene()
    frames = Together(image, np.abs(probe) ** 2, corners, np.ones(len(corners)))
    wrong = smooth_drift(len(corners)) + np.random.default_rng(1).normal(0, 0.2, (len(corners), 2))
    wrong -= wrong.mean(axis=0)
    found = frames.solve(frames.hold(wrong))
    time = np.linspace(-1, 1, len(wrong))
    left = wrong - found
    left -= left.mean(axis=0)
    assert np.abs(time @ left).max() < 0.2 * np.abs(time @ wrong).max()
    assert left.std() < 0.25 * wrong.std()
    # each frame by itself, with the object as it is: drift hardly moves
    single = frames.alone(frames.hold(wrong))
    assert np.abs(time @ (wrong - single)).max() > 0.7 * np.abs(time @ wrong).max()


def test_the_object_goes_where_the_frames_go():
    image, probe, corners = scene()
    frames = Together(image, np.abs(probe) ** 2, corners, np.ones(len(corners)))
    moved = frames.follow(image, np.full((len(corners), 2), [0.3, -0.2]))
    expected = sum(
        w * ndimage.shift(part, [0.3, -0.2], order=3) for part, w in ((image.real, 1), (image.imag, 1j))
    )
    lit = slice(40, 100), slice(40, 100)
    assert np.abs(moved - expected)[lit].max() < 0.02
    outside = np.abs(moved - image)[:3]
    assert outside.max() < 1e-3  # where no light falls nothing moves
