# SPDX-License-Identifier: Apache-2.0
"""The backends of the operator tests are what their names say."""

from __future__ import annotations

import _backends
import pytest
import torch

from pydense import _library

_library.load()
needs_simt = pytest.mark.skipif(
    _backends.missing("simt") is not None, reason=str(_backends.missing("simt"))
)


def test_values_layouts_and_operator_checks(backend):
    x = torch.randn(4, 6, 5, device=backend.device)
    for view in (x, x[:, ::2], x.expand(3, 4, 6, 5), x[:0], x[1, 1, 1], x.transpose(0, 2)):
        assert torch.equal(torch.ops.pydense._selftest(view), 2 * view + 1)
    torch.library.opcheck(torch.ops.pydense._selftest.default, (x,))


def test_compiled(backend):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def doubled(x):
        return torch.ops.pydense._selftest(x) * 2

    x = torch.randn(5, device=backend.device)
    assert torch.equal(doubled(x), (2 * x + 1) * 2)


def test_bad_input(backend):
    x = torch.zeros(3, dtype=torch.float64, device=backend.device)
    with pytest.raises(ValueError, match=r"^selftest: x must be of dtype Float, got Double$"):
        torch.ops.pydense._selftest(x)


@needs_simt
def test_the_shim_runs_the_cuda_kernel_and_only_while_it_is_asked_to():
    x = torch.randn(1000)
    before = _backends.simt_launches()
    torch.ops.pydense._selftest(x)
    assert _backends.simt_launches() == before
    with _backends.use("simt") as backend:
        assert backend.is_cuda_code
        assert torch.equal(torch.ops.pydense._selftest(x), 2 * x + 1)
    assert _backends.simt_launches() == before + 1
    torch.ops.pydense._selftest(x)
    assert _backends.simt_launches() == before + 1


@needs_simt
def test_every_operator_with_a_cuda_kernel_runs_under_the_shim():
    registered = torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")
    ours = {name.split("::")[1] for name in registered if name.startswith("pydense::")}
    if not ours:
        pytest.skip("built without CUDA kernels")
    assert ours == set(_backends.simt_operators())
