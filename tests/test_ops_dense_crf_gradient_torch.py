# SPDX-License-Identifier: Apache-2.0
"""Gradients of the dense CRF as torch sees them: opcheck, compile, export, autocast; bad input."""

from __future__ import annotations

import pytest
import torch
from _crf_gradients import KERNELS
from _ops import one_thread as one_thread
from _ops import picture, random, same_bits
from torch.autograd import forward_ad
from torch.export import Dim, export
from torch.library import opcheck

from pydense.nn import DenseCRF
from pydense.ops import dense_crf, permutohedral_filter

OPS = torch.ops.pydense


class TestTorch:
    def test_opcheck(self):
        unary = random(2, 4, 6, 7).requires_grad_()
        features = random(2, 5, 6, 7).requires_grad_()
        lattice = OPS.dense_crf_lattice(features.detach(), "symmetric", True)
        compat = torch.eye(4).requires_grad_()
        single = torch.tensor(3.0, requires_grad=True)
        q = random(2, 4, 6, 7).softmax(1).requires_grad_()
        nothing = torch.empty(0)
        last = unary.detach().to(memory_format=torch.channels_last).requires_grad_()
        for x, start, output, recompute in (
            (unary, None, "probabilities", False),
            (last, q, "logits", True),
        ):
            opcheck(
                OPS.dense_crf_mean_field_training.default,
                (
                    x, [lattice, lattice], [compat, single], [features, nothing], 2, True, start,
                    output, "filter", recompute,
                ),
            )  # fmt: skip
        opcheck(OPS.dense_crf_feature_gradient.default, (
            features.detach(), lattice, unary.detach(), q.detach(), None, "filter",
        ))  # fmt: skip
        opcheck(OPS.permutohedral_filter.default, (unary, lattice, False))
        opcheck(OPS.permutohedral_filter_of.default, (unary, lattice, features, True, "filter"))
        arguments = random(2, 3, 8).requires_grad_(), random(1, 2, 8).requires_grad_(), True
        opcheck(OPS.exact_gaussian_filter.default, arguments)

    @pytest.mark.parametrize("backend", ["lattice", "exact"])
    def test_compile(self, backend):
        image = picture(1, 3, 6, 7)

        def loss(logits, compat, sxy):
            gaussian = {"sxy": sxy, "compat": compat}
            kernels = {"gaussian": gaussian, "bilateral": KERNELS["bilateral"]}
            return dense_crf(logits, image, **kernels, iterations=2, backend=backend).square().sum()

        inputs = [random(1, 3, 6, 7), torch.eye(3), torch.tensor(2.3)]
        inputs = [x.requires_grad_() for x in inputs]
        eager = torch.autograd.grad(loss(*inputs), inputs)
        torch._dynamo.reset()
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        for own, expected in zip(
            torch.autograd.grad(compiled(*inputs), inputs), eager, strict=True
        ):
            torch.testing.assert_close(own, expected)

    def test_export_keeps_nothing_for_backward(self):
        class Net(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.layer, self.crf = torch.nn.Conv2d(3, 4, 1), DenseCRF(iterations=3)

            def forward(self, image):
                return self.crf(self.layer(image), image)

        net = Net()
        sizes = {0: Dim("n"), 2: Dim("h"), 3: Dim("w")}
        program = export(net, (picture(2, 3, 6, 7).float(),), dynamic_shapes=(sizes,))
        calls = [n for n in program.graph.nodes if "mean_field_training" in str(n.target)]
        assert [call.args[-1] for call in calls] == [True]  # recompute
        image = picture(3, 3, 9, 8).float()
        assert same_bits(program.module()(image), net(image))

    def test_second_derivative_raises(self):
        x = random(1, 3, 5, 6).requires_grad_()
        out = dense_crf(x, gaussian=KERNELS["gaussian"], iterations=2)
        (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match="dense_crf_mean_field_backward"):
            grad.sum().backward()

    @pytest.mark.parametrize("reverse", [False, True])
    def test_penalty_on_a_gradient_of_the_filter(self, reverse):
        """The gradient by the values depends on the features."""
        values, weights = random(1, 2, 6, 7).double(), random(1, 2, 6, 7, seed=1).double()

        def penalty(features):
            x = values.clone().requires_grad_()
            out = permutohedral_filter(x, features, reverse=reverse, feature_gradient="lattice")
            (grad,) = torch.autograd.grad((out * weights).sum(), x, create_graph=True)
            return grad.square().sum()

        features = (2 * random(1, 3, 6, 7, seed=2)).double().requires_grad_()
        (own,) = torch.autograd.grad(penalty(features), features)
        direction = random(1, 3, 6, 7, seed=3).double()
        step = 1e-6
        ends = [penalty((features + sign * step * direction).detach()) for sign in (1, -1)]
        expected = float(ends[0] - ends[1]) / (2 * step)
        assert abs(expected) > 1e-3
        assert float((own * direction).sum()) == pytest.approx(expected, rel=1e-5)

    def test_forward_mode_raises(self):
        x = random(1, 3, 5, 6)
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="tangent"):
            dense_crf(forward_ad.make_dual(x, x), gaussian=KERNELS["gaussian"])

    def test_backward_under_autocast(self):
        x = random(1, 3, 5, 6).requires_grad_()
        grads = []
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                out = dense_crf(x, gaussian={"sxy": 2, "compat": torch.eye(3)}, iterations=2)
                grads.append(torch.autograd.grad(out.square().sum(), x)[0])
        assert same_bits(*grads)

    def test_changed_in_place(self):
        """What backward needs and was overwritten is found out."""
        x = random(1, 3, 5, 6).requires_grad_()
        out = dense_crf(x, gaussian=KERNELS["gaussian"], iterations=2)
        loss = out.square().sum()
        with torch.no_grad():
            out.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


class TestErrors:
    def test_words(self):
        x = random(1, 3, 5, 6)
        with pytest.raises(ValueError, match="dense_crf: feature_gradient must be one of"):
            dense_crf(x, feature_gradient="exact")
        with pytest.raises(TypeError, match="dense_crf: recompute must be a bool"):
            dense_crf(x, recompute=1)
        for call in (
            lambda: dense_crf(x, self_term=False, feature_gradient="lattice"),
            lambda: permutohedral_filter(x, x, self_term=False, feature_gradient="lattice"),
        ):
            with pytest.raises(
                ValueError, match="feature_gradient must be 'filter' with self_term"
            ):
                call()

    @pytest.mark.parametrize("sxy", [[0.0, 1.0], [-1.0, 1.0], [torch.nan, 1.0], [1.0] * 3])
    def test_sigmas(self, sxy):
        with pytest.raises(ValueError, match=r"dense_crf: gaussian\['sxy'\] must be"):
            gaussian = {"sxy": torch.tensor(sxy), "compat": 1}
            dense_crf(random(1, 3, 5, 6), gaussian=gaussian)

    def test_tensor_sigmas_give_the_same_bits(self):
        logits, image = random(1, 3, 8, 9), picture(1, 3, 8, 9)
        plain = dense_crf(logits, image, **KERNELS)
        gaussian = {"sxy": torch.tensor(3.0), "compat": 3}
        bilateral = {"sxy": torch.tensor([40.0, 40.0]), "srgb": torch.tensor(13.0), "compat": 10}
        assert same_bits(dense_crf(logits, image, gaussian=gaussian, bilateral=bilateral), plain)
