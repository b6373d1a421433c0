# SPDX-License-Identifier: Apache-2.0
"""The compiled module itself: what the Python layers above keep from it must not crash it."""

import numpy as np
import pytest

from pydense import _core


@pytest.fixture
def field():
    field = _core.MeanField(64, 3)
    rng = np.random.default_rng(0)
    field.set_unary(rng.normal(size=(3, 64)).astype(np.float32))
    field.add_pairwise(
        _core.Lattice(rng.normal(size=(2, 64)).astype(np.float32), "symmetric"),
        np.array(2, np.float32),
    )
    return field


def test_no_lattice(field):
    with pytest.raises(TypeError):
        field.add_pairwise(None, np.array(1, np.float32))


def test_q_must_be_writeable(field):
    q = field.start()
    q.flags.writeable = False
    with pytest.raises(ValueError, match=r"^mean_field: q must be writeable"):
        field.step(q)


@pytest.mark.parametrize("strides", [(0, 4), (4, 0), (4, 4), (4, 8), (8, 4)])
def test_q_must_not_overlap_itself(field, strides):
    base = np.full(1000, 1 / 3, np.float32)
    q = np.lib.stride_tricks.as_strided(base, (3, 64), strides)
    with pytest.raises(ValueError, match=r"^mean_field: q must not overlap itself"):
        field.step(q)


def test_q_of_any_other_strides(field):
    expected = field.run(1)
    for big, view in (
        (np.empty((3, 64), np.float32), np.s_[:, :]),
        (np.empty((6, 130), np.float32), np.s_[::-2, 1:129:2]),
        (np.empty((64, 3), np.float32).T, np.s_[:, ::-1]),
    ):
        q = big[view]
        q[...] = field.start()
        field.step(q)
        np.testing.assert_array_equal(q, expected)


def test_energies_that_overflow(field):
    rng = np.random.default_rng(1)
    lattice = _core.Lattice(rng.normal(size=(2, 64)).astype(np.float32))
    # 3e38 for one label against -3e38 for another: inf - inf.
    field.add_pairwise(lattice, np.array([3e38, -3e38, 0], np.float32))
    field.add_pairwise(lattice, np.array([-3e38, 3e38, 0], np.float32))
    with pytest.raises(ValueError, match=r"^mean_field: the energies of a point overflow float32"):
        field.run(3)


def test_flushed_denormals_of_the_caller_change_nothing():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(2)
    lattice = _core.Lattice((rng.normal(size=(2, 40_000)) * 20).astype(np.float32))
    values = (rng.normal(size=(3, 40_000)) * 1e-38).astype(np.float32)
    expected = lattice.filter(values)
    before = _core.get_num_threads()
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU does not flush denormals")
    try:
        for threads in (1, 2, 3):
            _core.set_num_threads(threads)  # new threads inherit the mode of this one
            for _ in range(3):
                got = lattice.filter(values)
                # Compared as bits: a flushing comparison takes denormals for 0.
                assert np.array_equal(got.view(np.uint32), expected.view(np.uint32))
    finally:
        torch.set_flush_denormal(False)
        _core.set_num_threads(before)
