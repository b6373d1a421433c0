# SPDX-License-Identifier: Apache-2.0
"""The filters of plain torch, against oracles in NumPy, recorded tables and their own matrices."""

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from _oracle import ExactKernel, PermutohedralLattice  # noqa: E402

from pydense import reference  # noqa: E402
from pydense.reference.permutohedral import PermutohedralLattice as TorchLattice  # noqa: E402

MONAI = json.loads((Path(__file__).parent / "data" / "monai_cpu.json").read_text())
NORMALIZATIONS = (None, "before", "after", "symmetric")
FILTERS = {
    "lattice": reference.permutohedral_filter,
    "exact": reference.exact_gaussian_filter,
}


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def matrix_of(features, backend="lattice", **options):
    """The (P, P) matrix of a filter on (d, P) features, from unit vectors."""
    unit = torch.eye(features.shape[1], dtype=features.dtype)[None]
    return FILTERS[backend](unit, features[None], **options)[0].T


@pytest.mark.parametrize("dims", [1, 2, 3, 5, 8])
def test_lattice_equals_the_oracle(dims):
    features = normal(dims, 50, seed=dims) * 1.5
    oracle = PermutohedralLattice(features.numpy())
    expected = oracle.filter(np.eye(50)).T
    np.testing.assert_allclose(matrix_of(features).numpy(), expected, atol=1e-14)
    assert TorchLattice(features[None], None, True).num_vertices == len(oracle.vertices)


def test_vertices_whose_coordinates_need_more_than_63_bits():
    # 20 dimensions over 200 standard deviations; neighbours in pairs, so that something is blurred.
    centre = normal(20, 30, seed=1) * 200
    features = torch.cat([centre, centre + 0.3 * normal(20, 30, seed=2)], dim=1)
    expected = PermutohedralLattice(features.numpy()).filter(np.eye(60)).T
    np.testing.assert_allclose(matrix_of(features).numpy(), expected, atol=1e-14)
    assert np.count_nonzero(expected) > 60


def test_lattice_finds_the_simplices_of_the_compiled_core():
    from pydense import _core

    y, x = np.mgrid[:40, :50].reshape(2, -1).astype(np.float32)
    colour = np.random.default_rng(0).integers(0, 256, 2000).astype(np.float32)
    for rows in ((x / 3, y / 3), (x / 67, y / 67, colour / 3), (x, y, colour, colour[::-1])):
        features = np.stack(rows).astype(np.float32)
        core = _core.Lattice(features)
        tensor = torch.from_numpy(features)[None]
        assert TorchLattice(tensor, None, True).num_vertices == core.num_vertices
        values = np.random.default_rng(1).random((3, 2000), np.float32)
        for reverse in (False, True):
            ours = reference.permutohedral_filter(
                torch.from_numpy(values)[None], tensor, reverse=reverse
            )
            core_result = core.filter(values, reverse=reverse)
            np.testing.assert_allclose(ours[0].numpy(), core_result, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("backend", FILTERS)
@pytest.mark.parametrize("dims", [1, 2, 3, 5])
def test_self_term_is_the_diagonal(backend, dims):
    features = normal(dims, 40, seed=dims)
    full = matrix_of(features, backend)
    without = matrix_of(features, backend, self_term=False)
    torch.testing.assert_close(without, full - full.diag().diag(), atol=1e-14, rtol=0)
    assert full.diag().min() > 0.05


@pytest.mark.parametrize("self_term", [True, False])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("backend", FILTERS)
def test_normalisation_is_by_row_sums(backend, normalization, self_term):
    features = normal(2, 40) * 2
    features[:, -1] = 90.0  # a point without neighbours
    k = matrix_of(features, backend, self_term=self_term)
    n = k.sum(dim=1)
    # The floor of the lattice; in the exact kernel nothing is then left to divide by it.
    n = torch.maximum(n, 1e-3 * matrix_of(features, backend).sum(dim=1))
    before, after = {
        None: (n**0, n**0), "before": (1 / n, n**0), "after": (n**0, 1 / n),
        "symmetric": (n**-0.5, n**-0.5),
    }[normalization]  # fmt: skip
    options = {"normalization": normalization, "self_term": self_term}
    found = matrix_of(features, backend, **options)
    torch.testing.assert_close(found, after[:, None] * k * before, atol=1e-10, rtol=1e-8)
    assert found.isfinite().all()


@pytest.mark.parametrize("self_term", [True, False])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_reverse_is_the_transposed_filter(normalization, self_term):
    features = normal(3, 40)
    options = {"normalization": normalization, "self_term": self_term}
    forward = matrix_of(features, **options)
    backward = matrix_of(features, reverse=True, **options)
    torch.testing.assert_close(backward, forward.T, atol=1e-13, rtol=1e-9)
    assert (forward - forward.T).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_filter_equals_the_oracle_far_from_the_origin(dtype, monkeypatch):
    monkeypatch.setattr("pydense.reference.exact._BLOCK", 700)  # uneven blocks of rows
    features = normal(3, 60) * 2
    moved = (features + torch.tensor([[100.0], [-300], [50]])).to(dtype)
    kernel = ExactKernel(moved.double().numpy() - np.array([[100.0], [-300], [50]]))
    found = matrix_of(moved, "exact").double().numpy()
    np.testing.assert_allclose(found, kernel.matrix, rtol=2e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("backend", FILTERS)
@pytest.mark.parametrize("shared", [True, False])
def test_batch_shapes_and_types(backend, shared):
    run = FILTERS[backend]
    values, features = normal(3, 2, 4, 5), normal(1 if shared else 3, 2, 4, 5, seed=1)
    options = {"normalization": "symmetric", "self_term": False}
    whole = run(values, features, **options)
    assert whole.shape == values.shape
    for i in range(3):
        own = features[:1] if shared else features[i : i + 1]
        torch.testing.assert_close(whole[i : i + 1], run(values[i : i + 1], own, **options))
    assert run(values[:0], features[:1]).shape == (0, 2, 4, 5)
    half = run(values.half(), features.half())
    assert half.dtype == torch.float16
    same = run(values.half().float(), features.half().float())
    assert torch.equal(half, same.half())


@pytest.mark.parametrize("backend", FILTERS)
def test_bad_filter_arguments(backend):
    run = FILTERS[backend]
    values, features = torch.ones(2, 3, 4), torch.ones(2, 2, 4)
    with pytest.raises(ValueError, match="features must have the shape"):
        run(values, features[:, :, :3])
    with pytest.raises(ValueError, match="features must have the shape"):
        run(values[:1], features)
    with pytest.raises(ValueError, match="values must be"):
        run(values[0], features)
    with pytest.raises(ValueError, match="normalization must be"):
        run(values, features, normalization="none")
    with pytest.raises(TypeError, match="floating-point"):
        run(values.long(), features)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e9])
def test_lattice_refuses_features_without_a_simplex(bad):
    features = torch.zeros(1, 2, 4)
    features[0, 1, 2] = bad
    with pytest.raises(ValueError, match="features must be finite and within"):
        reference.permutohedral_filter(torch.ones(1, 1, 4), features)


@pytest.mark.parametrize("name", [name for name in MONAI if name.startswith("phl")])
def test_monai_phl(name):
    table = MONAI[name]
    values, features, expected = (
        torch.tensor(table[key]) for key in ("input", "features", "expected")
    )
    sigmas = torch.tensor(table["sigmas"][: features.shape[1]])  # MONAI ignores the rest
    features = features / sigmas.view(1, -1, *[1] * (features.dim() - 2))
    result = reference.permutohedral_filter(values, features, normalization="after")
    torch.testing.assert_close(result, expected.view_as(result), atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", FILTERS)
def test_filter_gradients(backend):
    features = normal(1, 2, 12)
    values = normal(1, 2, 12, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v: FILTERS[backend](v, features, normalization="symmetric"), values
    )
