# SPDX-License-Identifier: Apache-2.0
"""What every operator with CUDA kernels keeps on a GPU; where it can, the shim shows it as well."""

from __future__ import annotations

import _backends
import pytest
import torch
from _cuda_calls import CALLS, Call
from _ops import same_bits

cuda = pytest.mark.cuda
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
every_call = pytest.mark.parametrize("name", CALLS)
dtypes = pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name, call in CALLS.items() for dtype in call.dtypes],
    ids=lambda value: str(value).removeprefix("torch."),
)


def inputs_of(call, dtype, device, memory_format=torch.contiguous_format):
    made = []
    for x in call.inputs():
        x = x.to(device, dtype)
        made.append(x.contiguous(memory_format=memory_format) if x.dim() == 4 else x)
    return made


def result(call: Call, inputs, seed: int = 1):
    """The output and, where there is one, the gradient of every input."""
    if not call.gradient:
        return [call.run(*inputs)]
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = call.run(*leaves)
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out))]


@pytest.mark.small
@dtypes
def test_values_of_the_cpu_kernels_and_of_float64(cuda_code, name, dtype):
    """Both kernels are as close to float64 as the dtype allows, and so to each other."""
    call = CALLS[name]
    reference_dtype = torch.float64 if torch.float64 in call.dtypes else dtype
    reference = result(call, [x.to(dtype).to(reference_dtype) for x in call.inputs()])
    cpu = result(call, inputs_of(call, dtype, "cpu"))
    with _backends.use(cuda_code) as chosen:
        ours = result(call, inputs_of(call, dtype, chosen.device))
    for expected, theirs, found in zip(reference, cpu, ours, strict=True):
        limit = call.tolerance(dtype) * float(expected.abs().max())
        assert found.dtype == theirs.dtype
        assert found.stride() == theirs.stride()
        assert float((found.cpu().double() - expected.double()).abs().max()) <= limit
        assert float((found.cpu().double() - theirs.double()).abs().max()) <= 2 * limit


@dtypes
def test_memory_formats(cuda_code, name, dtype):
    call = CALLS[name]
    if not call.images:
        pytest.skip("no images among its inputs")
    with _backends.use(cuda_code) as chosen:
        first = result(call, inputs_of(call, dtype, chosen.device))
        last_inputs = inputs_of(call, dtype, chosen.device, torch.channels_last)
        last = result(call, last_inputs)
    assert all(same_bits(a, b) for a, b in zip(first, last, strict=True))


@dtypes
def test_same_bits_from_run_to_run(cuda_code, name, dtype):
    call = CALLS[name]
    runs = []
    for schedule in range(4):
        with _backends.use(cuda_code, schedule) as chosen:
            runs.append(result(call, inputs_of(call, dtype, chosen.device)))
    for other in runs[1:]:
        assert all(same_bits(a, b) for a, b in zip(runs[0], other, strict=True))


@every_call
def test_compiled(cuda_code, name):
    call = CALLS[name]
    torch._dynamo.reset()
    compiled = torch.compile(call.run, fullgraph=True, backend="aot_eager")
    with _backends.use(cuda_code) as chosen:
        inputs = inputs_of(call, torch.float32, chosen.device)
        assert same_bits(compiled(*inputs), call.run(*inputs))


@every_call
def test_autocast(cuda_code, name):
    call = CALLS[name]
    with _backends.use(cuda_code) as chosen:
        inputs = inputs_of(call, torch.float32, chosen.device)
        with torch.autocast(chosen.device.type, torch.bfloat16):
            out = call.run(*inputs)
        plain = call.run(*inputs)
    assert out.shape == plain.shape
    assert torch.allclose(out.double(), plain.double(), rtol=0.05, atol=0.05)


@cuda
@needs_gpu
@pytest.mark.small
@every_call
def test_follows_a_side_stream(name):
    call = CALLS[name]
    inputs = inputs_of(call, torch.float32, "cuda")
    expected = result(call, inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # what runs on another stream overtakes this one
        late = [x * 1 for x in inputs]
        found = result(call, late)
    stream.synchronize()
    assert all(same_bits(a, b) for a, b in zip(expected, found, strict=True))


@cuda
@needs_gpu
@every_call
def test_captured_in_a_graph(name):
    call = CALLS[name]
    if not call.graph:
        pytest.skip("it waits for the GPU")
    inputs = inputs_of(call, torch.float32, "cuda")
    others = [x.flip(-1).contiguous() for x in inputs]
    with torch.no_grad():
        expected = call.run(*others)
        warm = torch.cuda.Stream()
        warm.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm):
            call.run(*inputs)
        torch.cuda.current_stream().wait_stream(warm)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call.run(*inputs)
        for x, other in zip(inputs, others, strict=True):
            x.copy_(other)
        graph.replay()
    torch.cuda.synchronize()
    assert same_bits(out, expected)


@cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs on this machine")
@every_call
def test_runs_on_the_device_of_its_inputs(name):
    call = CALLS[name]
    with torch.cuda.device(0):
        found = result(call, inputs_of(call, torch.float32, "cuda:1"))
        assert torch.cuda.current_device() == 0
    expected = result(call, inputs_of(call, torch.float32, "cuda:0"))
    assert all(same_bits(a.cpu(), b.cpu()) for a, b in zip(found, expected, strict=True))


@cuda
@needs_gpu
@pytest.mark.parametrize("name", [name for name, call in CALLS.items() if call.large])
def test_more_than_2_to_the_31_elements(name):
    CALLS[name].large(torch.device("cuda"))
    torch.cuda.empty_cache()


def test_every_operator_with_cuda_kernels_has_a_call():
    """That a room does not forget its operators here: each launches something in some call."""
    if reason := _backends.missing("simt"):
        pytest.skip(reason)
    used: set[str] = set()
    with _backends.use("simt", used=used):
        for call in CALLS.values():
            result(call, inputs_of(call, torch.float32, "cpu"))
    assert set(_backends.simt_operators()) <= used
