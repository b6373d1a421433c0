# SPDX-License-Identifier: Apache-2.0
"""The dense CRF as a citizen of torch: layouts, compile, export, autocast, autograd, the cache."""

from __future__ import annotations

import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from _ops import CHANNELS_LAST, compats, layouts, one_number, picture, random, same_bits
from _ops import one_thread as one_thread
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, export
from torch.library import opcheck

from pydense.nn import DenseCRF
from pydense.ops import (
    clear_lattice_cache,
    dense_crf,
    dense_crf_energy,
    dense_crf_free_energy,
    dense_crf_steps,
    permutohedral_filter,
)
from pydense.ops._lattice_cache import LATTICES, LatticeCache

OPS = torch.ops.pydense
KERNELS = {"gaussian": {"sxy": 3, "compat": 3}, "bilateral": {"sxy": 40, "srgb": 13, "compat": 10}}
GAUSSIAN = {"gaussian": KERNELS["gaussian"]}


class TestOpcheck:
    """Schema, fake tensors with dynamic sizes, autograd registration, AOT dispatch."""

    features = random(2, 5, 6, 7)
    unary = random(2, 4, 6, 7)

    def lattice(self, features=features):
        return OPS.dense_crf_lattice(features, "symmetric", True)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_lattice(self, dtype):
        opcheck(OPS.dense_crf_lattice.default, (self.features.to(dtype), "after", False))

    @pytest.mark.parametrize("output", ["probabilities", "logits", "labels"])
    def test_mean_field(self, output):
        compats = [torch.tensor(3.0), torch.ones(4)]
        lattices = [self.lattice(), self.lattice(self.features[:1])]
        last = self.unary.to(memory_format=torch.channels_last)
        for unary in (self.unary, last, last[..., ::2].repeat(1, 1, 1, 2)[..., :7]):
            for q in (None, unary.softmax(1)):
                arguments = (unary, lattices, compats, 2, False, q, output)
                opcheck(OPS.dense_crf_mean_field.default, arguments)

    def test_free_energy(self):
        arguments = (self.unary, [self.lattice()], [torch.eye(4)], True, self.unary.softmax(1))
        opcheck(OPS.dense_crf_free_energy.default, arguments)

    @pytest.mark.parametrize("reverse", [False, True])
    def test_filter(self, reverse):
        opcheck(OPS.permutohedral_filter.default, (self.unary, self.lattice(), reverse))


class TestLayouts:
    @pytest.mark.parametrize("shape", [(2, 5, 7, 9), (2, 5, 3, 4, 5)])
    def test_images_and_volumes(self, shape):
        logits, image = random(*shape), picture(2, 3, *shape[2:])
        features = [{"features": random(1, 2, *shape[2:], seed=1), "compat": 2}]
        options = {**KERNELS, "features": features, "iterations": 2}
        expected = dense_crf(logits, image, **options)
        energy = dense_crf_free_energy(expected, logits, image, **options_without(options))
        form = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
        for name, x in layouts(logits):
            before = x.clone()
            for output in ("probabilities", "logits", "labels"):
                out = dense_crf(x, image, output=output, **options)
                assert same_bits(out, dense_crf(logits, image, output=output, **options)), name
                if output == "labels" or name not in CHANNELS_LAST:
                    assert out.is_contiguous(), name
                else:
                    assert out.is_contiguous(memory_format=form), name
            assert torch.equal(x, before), name
            *_, q = dense_crf_steps(x, image, **options)
            assert same_bits(q, expected) and q.stride() == dense_crf(x, image, **options).stride()
            parts = dense_crf_free_energy(q, x, image, **options_without(options))
            assert all(map(torch.equal, parts, energy)), name
        for (name, x), (_, f) in zip(layouts(image), layouts(features[0]["features"]), strict=True):
            strided = {**options, "features": [{"features": f, "compat": 2}]}
            assert same_bits(dense_crf(logits, x, **strided), expected), name

    def test_points(self):
        logits, features = random(2, 5, 40), random(2, 3, 40, seed=1)
        options = {"features": [{"features": features, "compat": 2}]}
        expected = dense_crf(logits, **options)
        for name, x in layouts(logits):
            out = dense_crf(x, **options)
            assert same_bits(out, expected), name
            points_last = name not in ("channels last", "transposed")  # one and the same here
            assert out.stride() == ((200, 40, 1) if points_last else (200, 1, 5)), name

    def test_expanded(self):
        logits, image = one_number((2, 3, 6, 7)), picture(1, 3, 6, 7)
        expected = dense_crf(logits.contiguous(), image.expand(2, 3, 6, 7), **KERNELS)
        assert same_bits(dense_crf(logits, image, **KERNELS), expected)
        grey = picture(1, 1, 6, 7)
        expected = dense_crf(logits, grey.expand(1, 3, 6, 7).contiguous(), **KERNELS)
        assert same_bits(dense_crf(logits, grey.expand(2, 3, 6, 7), **KERNELS), expected)

    def test_compat_layouts(self):
        logits, compat = random(1, 6, 5, 5), compats("matrix", 6)
        expected = dense_crf(logits, gaussian={"sxy": 2, "compat": compat})
        for name, c in layouts(compat):
            out = dense_crf(logits, gaussian={"sxy": 2, "compat": c})
            assert same_bits(out, expected), name
        constant = dense_crf(logits, gaussian={"sxy": 2, "compat": [1.5] * 6})
        expanded = torch.tensor(1.5).expand(6)
        assert same_bits(dense_crf(logits, gaussian={"sxy": 2, "compat": expanded}), constant)


def options_without(options):
    return {name: value for name, value in options.items() if name != "iterations"}


def compiled(function, **options):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


class TestCompile:
    def test_everything_in_one_graph(self):
        def both(logits, image, features):
            kernel = {"features": features, "compat": torch.eye(4)}
            q = dense_crf(logits, image, **KERNELS, features=[kernel])
            parts = dense_crf_free_energy(q, logits, image, **KERNELS)
            labels = dense_crf(logits, image, **KERNELS, output="labels", unary_type="energy")
            energy = dense_crf_energy(labels, logits, image, **KERNELS)
            return q, parts.kl, labels, energy, permutohedral_filter(q, features)

        function = compiled(both)
        for size in ((6, 7), (8, 5)):
            inputs = (random(2, 4, *size), picture(2, 3, *size), random(1, 3, *size, seed=1))
            assert all(map(same_bits, function(*inputs), both(*inputs)))

    def test_sizes_stay_dynamic(self):
        count = CompileCounterWithBackend("aot_eager")
        torch._dynamo.reset()
        function = torch.compile(DenseCRF(), fullgraph=True, backend=count, dynamic=True)
        compilations = []
        for batch, height, width in ((2, 6, 7), (3, 9, 5), (4, 30, 31)):
            logits, image = random(batch, 3, height, width), picture(batch, 3, height, width)
            assert same_bits(function(logits, image), DenseCRF()(logits, image))
            compilations.append(count.frame_count)
        assert compilations[0] == compilations[-1]

    def test_strides(self):
        function = compiled(lambda x: dense_crf(x, **GAUSSIAN))
        for name, x in layouts(random(2, 4, 5, 6)):
            assert function(x).stride() == dense_crf(x, **GAUSSIAN).stride(), name

    def test_nothing_is_cached(self):
        clear_lattice_cache()
        compiled(lambda x: dense_crf(x, **GAUSSIAN))(random(1, 2, 5, 6))
        assert len(LATTICES) == 0


class TestExport:
    @pytest.mark.parametrize("strict", [False, True])
    def test_images(self, strict, tmp_path):
        crf = DenseCRF()
        sizes = {0: Dim("n"), 2: Dim("h"), 3: Dim("w")}
        shapes = {"logits": sizes, "image": sizes}
        inputs = (random(2, 3, 6, 7), picture(2, 3, 6, 7))
        program = export(crf, inputs, dynamic_shapes=shapes, strict=strict)
        torch.export.save(program, tmp_path / "crf.pt2")
        loaded = torch.export.load(tmp_path / "crf.pt2").module()
        for batch, height, width in ((2, 6, 7), (3, 20, 11), (5, 2, 40)):
            logits, image = random(batch, 3, height, width), picture(batch, 3, height, width)
            assert same_bits(loaded(logits, image), crf(logits, image))

    def test_volumes_and_labels(self):
        class Labels(torch.nn.Module):
            def forward(self, logits, image):
                return dense_crf(logits, image, **KERNELS, output="labels")

        sizes = {0: Dim("n"), 2: Dim("d"), 3: Dim("h"), 4: Dim("w")}
        inputs = (random(2, 3, 3, 4, 5), picture(2, 1, 3, 4, 5))
        program = export(Labels(), inputs, dynamic_shapes=(sizes, sizes)).module()
        logits, image = random(3, 3, 5, 6, 7), picture(3, 1, 5, 6, 7)
        assert torch.equal(program(logits, image), Labels()(logits, image))

    def test_points(self):
        crf = DenseCRF(None, None, features=[{"sigma": 0.5, "compat": 2}])
        sizes = {0: Dim("n"), 2: Dim("p")}
        inputs = (random(2, 3, 30), None, [random(2, 4, 30, seed=1)])
        program = export(crf, inputs, dynamic_shapes=(sizes, None, [sizes])).module()
        logits, features = random(3, 3, 45), random(3, 4, 45, seed=1)
        assert same_bits(program(logits, None, [features]), crf(logits, None, [features]))


class TestAutocast:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_results_are_those_without(self, dtype):
        logits, image = random(1, 4, 8, 9).to(dtype), picture(1, 3, 8, 9)
        matrix = {"gaussian": {"sxy": 2, "compat": compats("matrix", 4)}}
        expected = dense_crf(logits, image, **KERNELS), dense_crf(logits, **matrix)
        parts = dense_crf_free_energy(expected[1], logits, **matrix)
        with torch.autocast("cpu", torch.bfloat16):
            out = dense_crf(logits, image, **KERNELS), dense_crf(logits, **matrix)
            assert all(map(same_bits, out, expected)) and out[0].dtype == dtype
            assert torch.equal(dense_crf_free_energy(out[1], logits, **matrix).kl, parts.kl)

    def test_after_a_layer_in_16_bit(self):
        layer, image = torch.nn.Conv2d(3, 4, 1), picture(1, 3, 8, 9)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            logits = layer(image.float())
            out = DenseCRF()(logits, image)
        assert logits.dtype == out.dtype == torch.bfloat16
        assert same_bits(out, DenseCRF()(logits, image))


class TestAutograd:
    image = picture(1, 3, 6, 7)

    def test_free_energy_is_guarded(self):
        """The one function here without a gradient says so."""
        for name in ("unary", "image", "compat", "features"):
            x = {
                "unary": random(1, 3, 6, 7),
                "image": self.image.float(),
                "compat": torch.ones(3),
                "features": random(1, 2, 6, 7),
            }
            x[name].requires_grad_()
            kernels = {
                "bilateral": {"sxy": 5, "srgb": 13, "compat": x["compat"]},
                "features": [{"features": x["features"], "compat": 1}],
            }
            out = dense_crf(x["unary"], x["image"], **kernels)
            energy = dense_crf_free_energy(out.detach(), x["unary"], x["image"], **kernels)
            for result in (energy.kl, energy.pairwise):
                with pytest.raises(NotImplementedError, match="gradient is not implemented yet"):
                    result.sum().backward()
            labels = dense_crf(x["unary"], x["image"], output="labels", **kernels)
            assert not labels.requires_grad
            with torch.no_grad():
                assert not dense_crf(x["unary"], x["image"], **kernels).requires_grad

    def test_inference_mode_and_the_cache(self):
        """A lattice made in inference mode serves outside it, and the other way round."""
        clear_lattice_cache()
        logits = random(1, 3, 6, 7)
        with torch.inference_mode():
            first = dense_crf(logits, **GAUSSIAN)
        assert not next(iter(LATTICES._lattices.values())).is_inference()
        out = dense_crf(logits.clone().requires_grad_(), **GAUSSIAN)
        assert same_bits(out, first.clone())
        with torch.inference_mode():
            assert same_bits(dense_crf(logits, **GAUSSIAN), first)


def test_fake_tensors():
    clear_lattice_cache()
    with FakeTensorMode():
        logits = torch.empty(2, 3, 6, 7).to(memory_format=torch.channels_last)
        q = OPS.dense_crf_mean_field(logits, [], [], 1, False, None, "probabilities")
        assert q.shape == logits.shape and q.is_contiguous(memory_format=torch.channels_last)
    assert len(LATTICES) == 0


class TestLatticeCache:
    @pytest.fixture(autouse=True)
    def _clear(self):
        clear_lattice_cache()
        yield
        clear_lattice_cache()

    def run(self, size=(20, 30), dtype=torch.float32, sxy=3, **options):
        return dense_crf(
            random(1, 3, *size, dtype=dtype), gaussian={"sxy": sxy, "compat": 3}, **options
        )

    def test_same_bits_with_and_without(self):
        first = self.run()
        assert len(LATTICES) == 1
        assert same_bits(self.run(), first)
        clear_lattice_cache()
        assert len(LATTICES) == LATTICES.nbytes == 0
        assert same_bits(self.run(), first)

    def test_what_tells_lattices_apart(self):
        variants = [
            {},
            {"size": (30, 20)},
            {"size": (5, 20, 6)},
            {"sxy": (3, 4)},
            {"sxy": (4, 3)},
            {"dtype": torch.float64},
            {"normalization": "after"},
            {"normalization": None},
            {"self_term": False},
        ]
        results = [self.run(**options) for options in variants]
        assert len(LATTICES) == len(variants)
        again = [self.run(**options) for options in variants]
        assert all(map(same_bits, results, again)) and len(LATTICES) == len(variants)
        clear_lattice_cache()
        for options, result in zip(variants, results, strict=True):
            assert same_bits(self.run(**options), result)
            clear_lattice_cache()
        # Equal numbers are equal keys; compat, labels, batch and 16 bits make no difference.
        self.run(), self.run(sxy=3.0), self.run(sxy=(3, 3)), self.run(dtype=torch.float16)
        dense_crf(random(2, 7, 20, 30), gaussian={"sxy": 3, "compat": -1})
        assert len(LATTICES) == 1

    def test_the_limits(self):
        cache = LatticeCache(max_entries=3, max_bytes=100)

        def get(key, size):
            return cache.get(key, lambda: torch.zeros(size, dtype=torch.uint8))

        first = get("a", 10)
        assert get("a", 99) is first
        get("b", 10), get("c", 10), get("a", 99), get("d", 10)  # b was used least recently
        assert len(cache) == 3 and cache.nbytes == 30 and get("a", 99) is first
        assert len(get("b", 11)) == 11
        get("large", 101)  # not kept
        assert len(cache) == 3 and cache.nbytes == 31
        get("e", 95)
        assert (len(cache), cache.nbytes) == (1, 95)

    def test_threads(self):
        expected = [self.run(size=(10 + n % 20, 12)) for n in range(40)]
        clear_lattice_cache()
        barrier = threading.Barrier(4)

        def work(offset):
            barrier.wait()
            order = [(n + offset) % 40 for n in range(40)]
            return {n: self.run(size=(10 + n % 20, 12)) for n in order}

        with ThreadPoolExecutor(4) as pool:
            for results in pool.map(work, (0, 10, 20, 30)):
                assert all(same_bits(results[n], expected[n]) for n in range(40))
        assert 0 < len(LATTICES) <= 16
        assert LATTICES.nbytes == sum(x.nbytes for x in LATTICES._lattices.values())


FORK = """
    import os
    import torch
    from pydense.nn import DenseCRF

    torch.set_num_threads(4)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 5, 150, 200, generator=generator)
    image = torch.randint(50, (1, 3, 150, 200), generator=generator)
    expected = DenseCRF()(logits, image)  # the parent's threads and its cache exist now
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # as a DataLoader's worker does: torch's own threads are gone
        os._exit(0 if torch.equal(DenseCRF()(logits, image), expected) else 3)
    print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_works_after_fork(run_python):
    result = run_python("-c", textwrap.dedent(FORK), timeout=60)
    assert (result.returncode, result.stdout) == (0, "child 0\n"), result.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("labels", [9, 21, 40])
def test_labels_that_lie_in_planes_and_side_by_side_give_the_same_bits(labels, dtype):
    """Small lattices: planes are turned once, and read point by point from then on."""
    generator = torch.Generator().manual_seed(labels)
    unary = torch.randn(2, labels, 67, 83, generator=generator, dtype=dtype)
    unary[0, 1, 3] = torch.inf  # an energy: forbidden
    image = torch.linspace(0, 80, 67 * 83).view(1, 1, 67, 83).expand(2, 3, -1, -1)
    terms = {
        "gaussian": {"sxy": 9, "compat": 2.0},
        "bilateral": {"sxy": 60, "srgb": 25, "compat": 3.0},
        "unary_type": "energy",
    }
    for iterations in (2, 3, 6):
        planes = dense_crf(unary, image, iterations=iterations, **terms)
        last = unary.to(memory_format=torch.channels_last)
        side_by_side = dense_crf(last, image, iterations=iterations, **terms)
        assert torch.equal(planes, side_by_side)
        assert planes.isfinite().all() and (planes[0, 1, 3] == 0).all()
