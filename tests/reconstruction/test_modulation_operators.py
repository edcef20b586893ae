"""The loops between the crystal's near field and the detector, against matrices written out."""

from __future__ import annotations

import numpy as np
import pytest

from bcmi_beamline.reconstruction.modulation.operators import (
    SlowRows,
    fold_light,
    in_whole_numbers,
    unfold_light,
)

PLACE = (2, 3, -17, 11)
"""Corner of the patch in the map, and from the beam axis: folding begins within the field."""


def noise(rng, *shape):
    return (rng.normal(size=shape) + 1j * rng.normal(size=shape)).astype(np.complex64)


def dense(slow: SlowRows, count: int) -> np.ndarray:
    """`SlowRows` as a matrix (rows wanted, rows computed)."""
    matrix = np.zeros((count, slow.count))
    for row in range(count):
        near = row // slow.step
        matrix[row, near : near + slow.taps.shape[1]] = slow.taps[row % slow.step]
    return matrix


def folded(light: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    out = np.zeros(shape, complex)
    rows, columns = (PLACE[2 + axis] + np.arange(n) for axis, n in enumerate(light.shape))
    np.add.at(out, np.ix_(rows % shape[0], columns % shape[1]), light)
    return out


@pytest.mark.parametrize("step", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("patch", [(20, 19), (64, 70), (43, 101)])  # within the field, folded, wide
def test_light_is_interpolated_sent_through_the_modulator_and_folded(step, patch):
    rng, shape = np.random.default_rng(step), (30, 32)
    slow = SlowRows(10, 20.0 * step, patch[0])
    assert slow.step == step
    film, unit = in_whole_numbers(noise(rng, patch[0] + 5, patch[1] + 9))
    map_ = unit * film.astype(np.float32).view(np.complex64)
    inside = map_[PLACE[0] : PLACE[0] + patch[0], PLACE[1] : PLACE[1] + patch[1]]
    few, psi = noise(rng, slow.count, patch[1]), np.empty(shape, np.complex64)
    fold_light(few, unit * slow.taps, film, PLACE, patch[0], psi)
    expected = folded(dense(slow, patch[0]) @ few * inside, shape)
    np.testing.assert_allclose(psi, expected, atol=1e-5 * np.abs(expected).max())

    field = noise(rng, *shape)
    rows, columns = (PLACE[2 + axis] + np.arange(n) for axis, n in enumerate(patch))
    seen = field[np.ix_(rows % shape[0], columns % shape[1])] * inside.conj()
    for least in (-1.0, 0.05):
        back = seen if least < 0 else seen / (np.abs(inside) ** 2 + least)
        expected = dense(slow, patch[0]).T @ back
        scale = unit if least < 0 else 1 / unit
        found = np.zeros_like(few)
        unfold_light(field, scale * slow.taps, film, PLACE, patch[0], least / unit**2, found)
        np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


def test_a_map_in_whole_numbers_is_as_fine_as_said():
    film = np.exp(2j * np.pi * np.random.default_rng(0).uniform(size=(64, 64))).astype(np.complex64)
    film[0, 0] = 1.2  # a map that rings
    whole, unit = in_whole_numbers(film)
    assert whole.dtype == np.int16 and whole.nbytes == film.nbytes // 2
    parts = (whole * unit).astype(np.float32) - film.view(np.float32)
    assert np.abs(parts).max() < 2e-5
