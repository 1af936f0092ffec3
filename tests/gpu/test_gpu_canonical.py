"""The canonical kernels on a GPU: the bits of the CPU, in the cases of the emulated device."""

import pytest
import torch
from canonical_cases import CASES, Case, cases, sweeps
from canonical_definition import assert_same_bits
from canonical_inputs import DTYPES, draw
from hypothesis import given, settings
from hypothesis import strategies as st

from primitives import canonical
from primitives.env import PROPERTY_CASES

CUDA = torch.device("cuda", 0)
NUM_EXAMPLES = max(200, int(PROPERTY_CASES.get()))


def compare(case: Case) -> None:
    """Raises AssertionError where the GPU's bits are not the CPU's."""
    actual, expected = case.run(CUDA), case.run()
    assert len(actual) == len(expected)
    for number, (got, want) in enumerate(zip(actual, expected, strict=True)):
        assert_same_bits(got, want, f"{case.function}, tensor {number}")


@pytest.mark.parametrize("name", sorted(CASES))
@settings(max_examples=NUM_EXAMPLES, deadline=None)
@given(st.data())
def test_the_bits_of_the_cpu(name: str, data: st.DataObject) -> None:
    compare(data.draw(cases(name)))


@pytest.mark.parametrize("case", sweeps(), ids=lambda case: f"{case.function} {case.args[0].dtype}")
def test_every_exponent(case: Case) -> None:
    compare(case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_large_matrix_products(dtype: torch.dtype, transposed: bool) -> None:
    """Both sizes of tiles, and more blocks of threads than the device holds at a time."""
    for m, n, k in ((300, 200, 700), (2050, 1030, 333)):
        a, b = draw((k, m) if transposed else (m, k), dtype, 0), draw((k, n), dtype, 1)
        compare(Case("gemm", (a, b), {"transpose_a": transposed, "out_dtype": dtype}))


@pytest.mark.sanitize
def test_one_of_each() -> None:
    """Small calls of all kernels; for the sanitizers."""
    x, ids = draw((4, 1500), torch.bfloat16, 0), torch.tensor([3, 0, 3, 1])
    weight = draw((1500,), torch.float32, 1)
    _, mean, rstd = canonical.layer_norm(x, weight, weight, 1e-5)
    square = draw((2, 33, 33), torch.float16, 2)
    logits = draw((8, 4, 37), torch.bfloat16, 3)
    for case in (
        Case("gelu", (x,)),
        Case("swiglu_backward", (x, x, x)),
        Case("dropout_add", (x, x, 0.3, 7, ids)),
        Case("row_sum", (x,)),
        Case("tree_sum", (x,)),
        Case("layer_norm", (x, weight, weight, 1e-5)),
        Case("layer_norm_backward", (x, x, mean, rstd, weight, 2)),
        Case("rms_norm_backward", (x, x, rstd, weight, 2)),
        Case("softmax", (x,)),
        Case("causal_softmax", (square, 0.3)),
        Case("padded_softmax_backward", (square, square, torch.tensor([1, 20]), 0.3)),
        Case("cross_entropy", (logits, ids)),
        Case("embedding_backward", (x, ids, (2, 2, 1500))),
        Case("gemm", (x, x), {"transpose_b": True}),
        Case("gemm", (draw((129, 40), torch.float32, 4), draw((40, 257), torch.float16, 5))),
    ):
        compare(case)


@pytest.mark.sanitize
def test_a_stream_of_the_caller_is_used() -> None:
    source = torch.randn(64, 5000).pin_memory()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        x = torch.zeros(64, 5000, device=CUDA)
        torch.cuda._sleep(50_000_000)
        x.copy_(source, non_blocking=True)
        sums = canonical.row_sum(x)
    stream.synchronize()
    assert_same_bits(sums.cpu(), canonical.row_sum(source))


def test_a_graph_replays() -> None:
    x = torch.zeros(33, 500, device=CUDA)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        canonical.softmax(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = canonical.softmax(canonical.gelu(x))
    x.copy_(torch.randn(33, 500))
    graph.replay()
    assert_same_bits(y.cpu(), canonical.softmax(canonical.gelu(x.cpu())))


def test_mixed_devices_are_refused() -> None:
    x = torch.zeros(3, 4)
    with pytest.raises(ValueError, match="gelu_backward: dy must be a dense tensor on cuda:0, got"):
        canonical.gelu_backward(x, x.to(CUDA))
    with pytest.raises(ValueError, match="gelu_backward: dy must be a dense CPU tensor, got cuda"):
        canonical.gelu_backward(x.to(CUDA), x)


def test_an_id_outside_is_named() -> None:
    ids = torch.tensor([0, 7], device=CUDA)
    with pytest.raises(ValueError, match=r"ids must be in \[0, 6\), got 7 at position 1"):
        canonical.embedding(ids, torch.zeros(2, 3, 4, device=CUDA))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_of_the_tensors_is_used_and_the_current_one_kept() -> None:
    x = torch.randn(3, 5000)
    y = canonical.softmax(x.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    assert_same_bits(y.cpu(), canonical.softmax(x))
