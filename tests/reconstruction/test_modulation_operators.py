"""The loops between the crystal's near field and the detector, against matrices written out."""

from __future__ import annotations

import numpy as np
import pytest

from bcmi_beamline.reconstruction.modulation.operators import (
    BLOCK,
    SlowLines,
    fold_light,
    in_whole_numbers,
    unfold_light,
)

PLACE = (2, 3, -17, 11)
"""Corner of the patch in the map, and from the beam axis: folding begins within the field."""


def noise(rng, *shape):
    return (rng.normal(size=shape) + 1j * rng.normal(size=shape)).astype(np.complex64)


def dense(slow: SlowLines, count: int) -> np.ndarray:
    """`SlowLines` as a matrix (lines wanted, lines computed)."""
    matrix = np.zeros((count, slow.count))
    for line in range(count):
        near = line // slow.step
        matrix[line, near : near + slow.taps.shape[1]] = slow.taps[line % slow.step]
    return matrix


def folded(light: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    out = np.zeros(shape, complex)
    rows, columns = (PLACE[2 + axis] + np.arange(n) for axis, n in enumerate(light.shape))
    np.add.at(out, np.ix_(rows % shape[0], columns % shape[1]), light)
    return out


@pytest.mark.parametrize("steps", [(1, 1), (2, 1), (3, 5), (1, 4), (7, 8)])
@pytest.mark.parametrize("patch", [(20, 19), (64, 70), (43, 2 * BLOCK + 5)])  # within the field, folded, wide
def test_light_is_interpolated_sent_through_the_modulator_and_folded(steps, patch):
    rng, shape = np.random.default_rng(steps), (30, 32)
    slow = [SlowLines(10, 20.0 * step, n) for step, n in zip(steps, patch, strict=True)]
    assert (slow[0].step, slow[1].step) == steps
    rows, columns = (dense(lines, n) for lines, n in zip(slow, patch, strict=True))
    film, unit = in_whole_numbers(noise(rng, patch[0] + 5, patch[1] + 9))
    map_ = unit * film.astype(np.float32).view(np.complex64)
    inside = map_[PLACE[0] : PLACE[0] + patch[0], PLACE[1] : PLACE[1] + patch[1]]
    few, psi = noise(rng, slow[0].count, slow[1].count), np.empty(shape, np.complex64)
    fold_light(few, unit * slow[0].taps, slow[1].taps, film, PLACE, patch, psi)
    expected = folded(rows @ few @ columns.T * inside, shape)
    np.testing.assert_allclose(psi, expected, atol=1e-5 * np.abs(expected).max())

    field = noise(rng, *shape)
    at = np.ix_(*((PLACE[2 + axis] + np.arange(n)) % shape[axis] for axis, n in enumerate(patch)))
    seen = field[at] * inside.conj()
    for least in (-1.0, 0.05):
        back = seen if least < 0 else seen / (np.abs(inside) ** 2 + least)
        expected = rows.T @ back @ columns
        down = (unit if least < 0 else 1 / unit) * slow[0].taps
        found = np.zeros_like(few)
        unfold_light(field, down, slow[1].taps, film, PLACE, patch, least / unit**2, found)
        np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("most", [None, 4])
def test_lines_between_those_computed_are_told_to_two_parts_in_a_thousand(most):
    """Of waves of a window's whole band, and as a matrix."""
    rng, n, fresnel, count = np.random.default_rng(3), 24, 400.0, 300
    slow = SlowLines(n, fresnel, count, most)
    assert slow.step == (most or 8)
    waves = noise(rng, n, 20)
    x = np.arange(n) - (n - 1) / 2

    def band(at):
        return np.exp(2j * np.pi * np.multiply.outer(at, x) / fresnel) @ waves

    exact = band(np.arange(count))
    found = slow.matrix() @ band(slow.step * np.arange(slow.count) - slow.before)
    assert np.linalg.norm(found - exact) < (2e-3 if most is None else 3e-4) * np.linalg.norm(exact)
    np.testing.assert_array_equal(slow.matrix(), dense(slow, count).astype(np.float32))


def test_a_map_in_whole_numbers_is_as_fine_as_said():
    film = np.exp(2j * np.pi * np.random.default_rng(0).uniform(size=(64, 64))).astype(np.complex64)
    film[0, 0] = 1.2  # a map that rings
    whole, unit = in_whole_numbers(film)
    assert whole.dtype == np.int16 and whole.nbytes == film.nbytes // 2
    parts = (whole * unit).astype(np.float32) - film.view(np.float32)
    assert np.abs(parts).max() < 2e-5
