# SPDX-License-Identifier: Apache-2.0
"""Mean field in plain torch, against oracles in NumPy and recorded results."""

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from _oracle import ExactKernel, MeanField, PermutohedralLattice  # noqa: E402

from pydense import reference  # noqa: E402

MONAI = json.loads((Path(__file__).parent / "data" / "monai_cpu.json").read_text())
NORMALIZATIONS = {"NO": None, "BEFORE": "before", "AFTER": "after", "SYM": "symmetric"}
BACKENDS = ("lattice", "exact")


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def attracting(compat):
    """pydensecrf's sign and symmetrisation -> ours."""
    compat = torch.as_tensor(compat)
    return (
        compat if compat.dim() == 0 else -compat if compat.dim() == 1 else -(compat + compat.T) / 2
    )


def crop(golden, first, second, dtype=torch.float32, **options):
    image = torch.from_numpy(golden["image"]).permute(2, 0, 1)[None]
    unary = torch.from_numpy(golden["unary"]).view(1, 4, *image.shape[2:]).to(dtype)
    q = reference.dense_crf(
        unary,
        image,
        gaussian={"sxy": 3, "compat": attracting(first)},
        bilateral={"sxy": 80, "srgb": 13, "compat": attracting(second)},
        unary_type="energy",
        **options,
    )
    return q.flatten(2)[0].numpy()


@pytest.mark.parametrize("kind", ["potts", "diag", "matrix"])
@pytest.mark.parametrize("norm", NORMALIZATIONS)
def test_lattice_reproduces_pydensecrf(golden, norm, kind):
    base = {"potts": 3.0, "diag": golden["compat_diag"], "matrix": golden["compat_matrix"]}[kind]
    first, second = base, 10.0 if kind == "potts" else 2 * base
    if norm == "NO":
        first, second = 0.02 * first, 0.005 * second
    for iterations in (1, 5):
        q = crop(golden, first, second, iterations=iterations, normalization=NORMALIZATIONS[norm])
        expected = golden[f"pydensecrf_{norm}_{kind}_it{iterations}"]
        assert np.abs(q - expected).max() <= (1e-3 if norm == "NO" else 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", ["BEFORE", "AFTER", "SYM"])
def test_exact_reproduces_recorded_brute_force(golden, norm, dtype):
    for iterations in (1, 5):
        q = crop(
            golden, 3.0, 10.0, dtype, backend="exact", iterations=iterations,
            normalization=NORMALIZATIONS[norm],
        )  # fmt: skip
        assert np.abs(q - golden[f"exact_{norm}_potts_it{iterations}"]).max() <= 1e-5


def test_volume(golden):
    volume = torch.from_numpy(golden["vol3d"])
    unary = torch.from_numpy(golden["vol3d_unary"]).view(1, 3, *volume.shape)
    grid = torch.stack(torch.meshgrid(*map(torch.arange, volume.shape), indexing="ij")).float()
    q = reference.dense_crf(
        unary,
        features=(
            {"features": grid[None] / 2, "compat": 2},
            {"features": torch.cat([grid / 4, volume[None] / 8])[None], "compat": 4},
        ),
        iterations=5,
        unary_type="energy",
    )
    assert np.abs(q.flatten(2)[0].numpy() - golden["vol3d_Q_it5"]).max() <= 1e-4
    # Our own kernels take the axes in the order x, y, z.
    sxy, srgb = (2.0, 3.0, 4.0), 8.0
    ours = reference.dense_crf(
        unary,
        volume[None, None],
        gaussian={"sxy": 2, "compat": 2},
        bilateral={"sxy": sxy, "srgb": srgb, "compat": 4},
        iterations=2,
    )
    place = grid.flip(0) / torch.tensor(sxy).view(3, 1, 1, 1)
    by_hand = reference.dense_crf(
        unary,
        features=(
            {"features": grid.flip(0)[None] / 2, "compat": 2},
            {"features": torch.cat([place, volume[None] / srgb])[None], "compat": 4},
        ),
        iterations=2,
    )
    assert torch.equal(ours, by_hand)


@pytest.mark.parametrize("name", [name for name in MONAI if name.startswith("crf")])
def test_monai_crf(name):
    table = MONAI[name]
    iterations, bi_weight, gauss_weight, bi_spatial, bi_colour, gauss_spatial, update, matrix = (
        table["params"]
    )
    logits, image, expected = (
        torch.tensor(table[key]) for key in ("input", "features", "expected")
    )
    spatial = logits.shape[2:]
    grid = torch.stack(torch.meshgrid(*map(torch.arange, spatial), indexing="ij")).float()[None]
    c = torch.eye(logits.shape[1]) if matrix is None else torch.tensor(matrix).T
    grids = grid.expand(len(image), *grid.shape[1:])
    appearance = torch.cat([grids / bi_spatial, image / bi_colour], dim=1)
    q = reference.dense_crf(
        logits,
        features=(
            {"features": grid / gauss_spatial, "compat": update * gauss_weight * c},
            {"features": appearance, "compat": update * bi_weight * c},
        ),
        iterations=int(iterations),
        normalization="after",
    )
    torch.testing.assert_close(q, expected.view_as(q), atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mean_field_equals_the_oracle(backend):
    """A matrix that is not symmetric, a diagonal and Potts together; two images in a batch."""
    make = {"lattice": PermutohedralLattice, "exact": ExactKernel}[backend]
    labels, points = 3, 40
    logits, features = normal(2, labels, points), normal(2, 2, points, seed=1)
    compats = [torch.tensor(1.5), torch.tensor([0.5, 2, -1]), normal(3, 3, seed=2)]
    kernels = [{"features": features * (k + 1), "compat": c} for k, c in enumerate(compats)]
    q = reference.dense_crf(
        logits.double(), features=kernels, iterations=4, normalization="after", backend=backend
    )
    for i in range(2):
        oracle = MeanField(-logits[i].numpy(), [])
        for k, c in enumerate(compats):
            kernel = make(features[i].numpy() * (k + 1))
            mass = kernel.filter(np.ones((1, points)))[0]
            matrix = c.double().numpy()
            full = matrix if matrix.ndim == 2 else np.diag(np.broadcast_to(matrix, labels))
            oracle.terms.append((kernel, -full, np.ones(points), 1 / mass))
        np.testing.assert_allclose(q[i].numpy(), oracle.run(4), atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_three_forms_of_compatibility_agree(backend):
    logits, features = normal(1, 3, 30), normal(1, 2, 30, seed=1)
    forms = (2.0, [2.0, 2, 2], 2 * torch.eye(3))
    results = [
        reference.dense_crf(
            logits, features=[{"features": features, "compat": c}], iterations=3, backend=backend
        )
        for c in forms
    ]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_positive_attracts(backend):
    logits = torch.tensor([[[1.0, 0.0], [0.0, 0.5]]])  # two labels, two points at one place
    kernel = {"features": torch.zeros(1, 1, 2), "compat": 3.0}
    labels = reference.dense_crf(logits, features=[kernel], backend=backend, output="labels")
    assert labels.tolist() == [[0, 0]]
    kernel["compat"] = -30.0
    labels = reference.dense_crf(logits, features=[kernel], iterations=1, output="labels")
    assert labels.tolist() == [[1, 1]]  # both were told to differ from the more frequent label


CRF = {
    "gaussian": {"sxy": 2, "compat": 1.0},
    "bilateral": {"sxy": (6, 5), "srgb": 20, "compat": 2.0},
}


def picture(images=2, labels=3, height=6, width=7):
    image = torch.randint(0, 256, (images, 3, height, width), dtype=torch.uint8)
    return normal(images, labels, height, width, dtype=torch.float32), image


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_goes_in_and_what_comes_out(backend):
    logits, image = picture()
    run = {**CRF, "iterations": 3, "backend": backend}
    q = reference.dense_crf(logits, image, **run)
    assert q.shape == logits.shape
    torch.testing.assert_close(q.sum(dim=1), torch.ones(2, 6, 7))
    same = reference.dense_crf(logits, image.float(), **run)
    assert torch.equal(q, same)
    probabilities = torch.softmax(logits, dim=1)
    for unary, kind in ((-logits, "energy"), (probabilities, "probabilities")):
        other = reference.dense_crf(unary, image, unary_type=kind, **run)
        torch.testing.assert_close(other, q, atol=1e-5, rtol=0)
    after = reference.dense_crf(logits, image, output="logits", **run)
    torch.testing.assert_close(torch.softmax(after, dim=1), q)
    labels = reference.dense_crf(logits, image, output="labels", **run)
    assert labels.dtype == torch.int64
    assert torch.equal(labels, q.argmax(dim=1))
    for i in range(2):
        own = reference.dense_crf(logits[i : i + 1], image[i : i + 1], **run)
        torch.testing.assert_close(own, q[i : i + 1], atol=1e-6, rtol=0)
    assert reference.dense_crf(logits[:0], image[:0], **run).shape == (0, 3, 6, 7)


def test_no_iterations_leave_the_unary():
    logits, image = picture()
    tie = torch.zeros(1, 3, 2, 2)
    q = reference.dense_crf(logits, image, **CRF, iterations=0)
    torch.testing.assert_close(q, torch.softmax(logits, dim=1))
    assert torch.equal(reference.dense_crf(logits, iterations=0, output="logits"), logits)
    assert not reference.dense_crf(tie, iterations=0, output="labels").any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_are_the_iterations(backend):
    logits, image = picture()
    run = {**CRF, "backend": backend, "self_term": False}
    steps = reference.dense_crf_steps(logits, image, **run, iterations=None)
    assert len(list(reference.dense_crf_steps(logits, image, **run, iterations=2))) == 2
    for count, q in enumerate(islice(steps, 3), start=1):
        assert torch.equal(q, reference.dense_crf(logits, image, **run, iterations=count))


def test_16_bit_input_and_autocast_are_computed_in_float32():
    logits, image = picture()
    run = {"bilateral": {**CRF["bilateral"], "compat": normal(3, 3, dtype=torch.float32)}}
    expected = reference.dense_crf(logits.bfloat16().float(), image, **run)
    found = reference.dense_crf(logits.bfloat16(), image, **run)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(reference.dense_crf(logits.bfloat16().float(), image, **run), expected)


@pytest.mark.parametrize("self_term", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend, self_term):
    image = torch.randint(0, 256, (1, 3, 2, 3)).double()
    inputs = [normal(1, 3, 2, 3), torch.tensor(0.7).double(), normal(3), normal(3, 3)]

    def run(logits, potts, diagonal, matrix):
        return reference.dense_crf(
            logits,
            image,
            gaussian={"sxy": 1, "compat": potts},
            bilateral={"sxy": 2, "srgb": 60, "compat": diagonal},
            features=[{"features": image / 90, "compat": matrix}],
            iterations=2,
            backend=backend,
            self_term=self_term,
        )

    assert torch.autograd.gradcheck(run, [x.double().requires_grad_() for x in inputs])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"image": None}, ValueError, "image must be given"),
        ({"image": torch.zeros(3, 3, 6, 7)}, ValueError, "image must have the shape"),
        ({"unary": torch.zeros(3, 4)}, ValueError, "unary must be"),
        ({"unary": torch.zeros(2, 3, 6, 7).long()}, TypeError, "unary must be of floating"),
        ({"gaussian": {"sxy": 1}}, TypeError, "gaussian must have the entries sxy, compat"),
        ({"gaussian": {"sxy": 0, "compat": 1}}, ValueError, "must be positive"),
        ({"gaussian": {"sxy": (1, 2, 3), "compat": 1}}, ValueError, "one or 2 numbers"),
        (
            {"gaussian": {"sxy": 1, "compat": [1, 2]}},
            ValueError,
            r"compat must be a number, \(3,\)",
        ),
        ({"iterations": -1}, ValueError, "iterations must be"),
        ({"iterations": 1.5}, ValueError, "iterations must be"),
        ({"normalization": "none"}, ValueError, "normalization must be"),
        ({"backend": "cuda"}, ValueError, "backend must be"),
        ({"output": "map"}, ValueError, "output must be"),
        ({"unary_type": "energies"}, ValueError, "unary_type must be"),
    ],
)
def test_bad_arguments(change, error, message):
    logits, image = picture()
    arguments = {"unary": logits, "image": image, **CRF, **change}
    with pytest.raises(error, match=message):
        reference.dense_crf(**arguments)


def test_points_have_no_grid():
    logits = torch.zeros(1, 2, 5)
    with pytest.raises(ValueError, match="points have no grid"):
        reference.dense_crf(logits, gaussian=CRF["gaussian"])


def test_no_compiled_part_of_pydense_is_used(run_python):
    code = """
import sys, torch
from pydense import reference
reference.dense_crf(torch.zeros(1, 2, 4, 4), gaussian={"sxy": 1, "compat": 1})
reference.dense_crf(torch.zeros(1, 2, 4, 4), gaussian={"sxy": 1, "compat": 1}, backend="exact")
print(sorted(name for name in sys.modules if name.startswith("pydense")))
maps = open("/proc/self/maps").read()
print("libpydense" in maps, "pydense/_core" in maps)
"""
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    modules, loaded = done.stdout.splitlines()
    assert "_core" not in modules
    assert "ops" not in modules
    assert loaded == "False False"
