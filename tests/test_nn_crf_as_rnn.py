# SPDX-License-Identifier: Apache-2.0
"""CRFasRNN: the published parametrisation, training, autocast, compile, DDP."""

from __future__ import annotations

import copy

import pytest
import torch
from _ops import NORMALIZATIONS, picture, random, same_bits
from _ops import one_thread as one_thread
from torch import nn
from torch.autograd import gradcheck
from torch.export import Dim, export

from pydense import reference
from pydense.nn import CRFasRNN
from pydense.ops import dense_crf


def as_published(crf, logits, image):
    """The recurrence as the paper's ports write it, with plain filters."""
    spatial, bilateral = (
        torch.diag_embed(w.expand(crf.num_labels)) if w.dim() < 2 else w
        for w in (crf.spatial_ker_weights, crf.bilateral_ker_weights)
    )
    axes = logits.dim() - 2
    lines = [torch.arange(n, dtype=logits.dtype) for n in logits.shape[2:]]
    grid = torch.stack(torch.meshgrid(*lines, indexing="ij")[::-1]).expand(
        logits.shape[0], *[-1] * (axes + 1)
    )
    place, far, shade = (
        torch.as_tensor(crf.bandwidth(name))
        for name in ("spatial_sxy", "bilateral_sxy", "bilateral_srgb")
    )
    near, alike = grid / place, torch.cat([grid / far, image.to(logits.dtype) / shade], 1)
    z = logits
    for _ in range(crf.iterations):
        q = z.softmax(1)
        message = 0
        for weights, features in ((spatial, near), (bilateral, alike)):
            filtered = reference.permutohedral_filter(
                q, features, normalization=crf.normalization, self_term=crf.self_term
            )
            message = message + torch.einsum("lm,nm...->nl...", weights, filtered)
        z = logits + torch.einsum("lm,nm...->nl...", crf.compatibility_matrix, message)
    return z


def scrambled(crf, seed=0):
    """With parameters that are no multiples of the unit matrix."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in crf.named_parameters():
            if not name.startswith("log"):
                p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return crf


class TestParametrisation:
    def test_defaults(self):
        crf = CRFasRNN(4)
        assert [name for name, _ in crf.named_parameters()] == [
            "spatial_ker_weights", "bilateral_ker_weights", "compatibility_matrix",
        ]  # fmt: skip
        assert torch.equal(crf.spatial_ker_weights, 3 * torch.eye(4))
        assert torch.equal(crf.bilateral_ker_weights, 5 * torch.eye(4))
        assert torch.equal(crf.compatibility_matrix, torch.eye(4))
        logits, image = random(2, 4, 12, 15), picture(2, 3, 12, 15)
        expected = dense_crf(
            logits,
            image,
            gaussian={"sxy": 3, "compat": 3},
            bilateral={"sxy": 160, "srgb": 3, "compat": 5},
            normalization="after",
            iterations=5,
            output="logits",
        )
        torch.testing.assert_close(crf(logits, image), expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("kernel_weights", ["matrix", "label", "scalar"])
    @pytest.mark.parametrize("shape", [(2, 4, 7, 9), (1, 3, 3, 4, 5)])
    def test_against_the_published_recurrence(self, kernel_weights, shape):
        crf = CRFasRNN(shape[1], 3, kernel_weights=kernel_weights, bilateral_sxy=9).double()
        scrambled(crf)
        logits = random(*shape, dtype=torch.float64).requires_grad_()
        image = picture(shape[0], 3, *shape[2:])
        inputs = [logits, *crf.parameters()]
        own, plain = crf(logits, image), as_published(crf, logits, image)
        torch.testing.assert_close(own, plain, rtol=1e-9, atol=1e-9)
        weights = random(*shape, seed=1, dtype=torch.float64)
        grads = [torch.autograd.grad((out * weights).sum(), inputs) for out in (own, plain)]
        for mine, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)

    def test_gradcheck_with_bandwidths(self):
        """The exact backend has the true gradient of bandwidths too."""
        crf = CRFasRNN(3, 2, train_bandwidths=True, backend="exact", bilateral_srgb=40).double()
        names, values = zip(*scrambled(crf).named_parameters(), strict=True)
        image = picture(1, 3, 3, 4)

        def run(logits, *parameters):
            state = dict(zip(names, parameters, strict=True))
            return torch.func.functional_call(crf, state, (logits, image))

        logits = random(1, 3, 3, 4, dtype=torch.float64).requires_grad_()
        values = [v.detach().requires_grad_() for v in values]
        assert len(values) == 6
        assert gradcheck(run, (logits, *values), eps=1e-5, atol=1e-7)

    @pytest.mark.parametrize("normalization", NORMALIZATIONS)
    def test_options(self, normalization):
        crf = CRFasRNN(3, 2, normalization=normalization, self_term=False, bilateral_srgb=20)
        crf = scrambled(crf.double())
        logits, image = random(1, 3, 6, 7, dtype=torch.float64), picture(1, 3, 6, 7)
        torch.testing.assert_close(crf(logits, image), as_published(crf, logits, image))

    def test_state_dict_and_copies(self):
        crf, other = scrambled(CRFasRNN(4)), CRFasRNN(4)
        other.load_state_dict(crf.state_dict())
        logits, image = random(1, 4, 6, 7), picture(1, 3, 6, 7)
        assert same_bits(other(logits, image), crf(logits, image))
        assert same_bits(copy.deepcopy(crf)(logits, image), crf(logits, image))
        assert "iterations=5" in repr(crf) and "bilateral_sxy=160" in repr(crf)


class TestTraining:
    def test_learns_to_smooth(self):
        """Weights that start too low rise, and the loss falls with them and the bandwidths."""
        truth = (torch.arange(24) >= 12).long().expand(2, 16, 24)
        image = 60 + 120 * truth.unsqueeze(1).expand(-1, 3, -1, -1).byte()
        logits = nn.functional.one_hot(truth, 2).movedim(3, 1) + 2 * random(2, 2, 16, 24)
        crf = CRFasRNN(2, 3, spatial_weight=0.1, bilateral_weight=0.1, train_bandwidths=True)
        optimizer = torch.optim.Adam(crf.parameters(), lr=0.05)
        losses = []
        for _ in range(15):
            loss = nn.functional.cross_entropy(crf(logits, image), truth)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.5 * losses[0]
        assert crf.bilateral_ker_weights.diagonal().min() > 0.1
        assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in crf.parameters())

    def test_autocast_computes_in_float32(self):
        crf, image = scrambled(CRFasRNN(4, 2)), picture(1, 3, 8, 9)
        layer = nn.Conv2d(3, 4, 1)
        with torch.autocast("cpu", torch.bfloat16):
            logits = layer(image.float())
            out = crf(logits, image)
        assert logits.dtype == out.dtype == torch.bfloat16
        assert same_bits(out, crf(logits, image))
        out.float().square().sum().backward()
        assert layer.weight.grad is not None and crf.compatibility_matrix.grad.isfinite().all()

    @pytest.mark.parametrize("train_bandwidths", [False, True])
    def test_compile(self, train_bandwidths):
        crf = CRFasRNN(3, 2, train_bandwidths=train_bandwidths)
        logits, image = random(1, 3, 6, 7).requires_grad_(), picture(1, 3, 6, 7)
        inputs = [logits, *crf.parameters()]
        torch._dynamo.reset()
        compiled = torch.compile(crf, fullgraph=True, backend="aot_eager")
        grads = [
            torch.autograd.grad(f(logits, image).square().sum(), inputs) for f in (crf, compiled)
        ]
        for eager, own in zip(*grads, strict=True):
            torch.testing.assert_close(own, eager)

    def test_export(self):
        crf = CRFasRNN(3)
        sizes = {0: Dim("n"), 2: Dim("h"), 3: Dim("w")}
        inputs = random(2, 3, 6, 7), picture(2, 3, 6, 7)
        program = export(crf, inputs, dynamic_shapes={"logits": sizes, "image": sizes}).module()
        logits, image = random(3, 3, 9, 8), picture(3, 3, 9, 8)
        assert same_bits(program(logits, image), crf(logits, image))

    def test_ddp(self, tmp_path):
        from torch.nn.parallel import DistributedDataParallel

        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
        )
        try:
            net = nn.ModuleList([nn.Conv2d(3, 4, 1), CRFasRNN(4, 2)])
            net.forward = lambda image: net[1](net[0](image), image)
            image = picture(2, 3, 8, 9).float()
            loss = net(image).square().sum()
            expected = torch.autograd.grad(loss, list(net.parameters()))
            parallel = DistributedDataParallel(net)
            parallel(image).square().sum().backward()
            for p, grad in zip(net.parameters(), expected, strict=True):
                torch.testing.assert_close(p.grad, grad)
        finally:
            torch.distributed.destroy_process_group()


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"num_labels": 0}, "num_labels must be in"),
            ({"iterations": -1}, "iterations must be in"),
            ({"kernel_weights": "full"}, "kernel_weights must be one of"),
            ({"normalization": "none"}, "normalization must be one of"),
            ({"backend": "cuda"}, "backend must be one of"),
            ({"spatial_weight": [1.0, 2.0]}, "spatial_weight must be a number"),
            ({"bilateral_srgb": 0}, "bilateral_srgb must be positive"),
        ],
    )
    def test_constructor(self, options, text):
        with pytest.raises(ValueError, match=f"CRFasRNN: {text}"):
            CRFasRNN(**{"num_labels": 3, **options})

    def test_call(self):
        crf = CRFasRNN(3)
        with pytest.raises(ValueError, match="CRFasRNN: logits must have 3 labels"):
            crf(random(1, 4, 5, 6), picture(1, 3, 5, 6))
        with pytest.raises(ValueError, match="CRFasRNN: logits must have a shape"):
            crf(random(1, 3, 5), picture(1, 3, 5))
        with pytest.raises(ValueError, match="dense_crf: image must have shape"):
            crf(random(1, 3, 5, 6), picture(1, 3, 6, 5))
