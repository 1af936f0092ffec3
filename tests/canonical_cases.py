"""Random calls of every canonical function: one table, for the emulated device and for a GPU."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from canonical_inputs import DTYPES, draw, dtypes, families, seeds
from hypothesis import strategies as st
from torch import Tensor

from primitives import canonical

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """``canonical.<function>(*args, **options)``; nothing of it is changed by a call."""

    function: str
    args: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, device: torch.device = CPU) -> list[Tensor]:
        """What the call returns, then its float arguments as it left them; on the CPU."""
        args = [moved(x, device) if isinstance(x, Tensor) else x for x in self.args]
        options = {
            key: moved(x, device) if isinstance(x, Tensor) else x for key, x in self.options.items()
        }
        returned = getattr(canonical, self.function)(*args, **options)
        if returned is None:
            returned = ()
        if isinstance(returned, int):
            returned = torch.tensor(float(returned))
        results = [returned] if isinstance(returned, Tensor) else list(returned)
        assert all(x.device.type == device.type for x in results if x.dim() > 0)
        left = [x for x in args if isinstance(x, Tensor) and x.is_floating_point()]
        return [x.cpu() for x in (*results, *left)]


def moved(x: Tensor, device: torch.device) -> Tensor:
    """A copy with the same strides, as far from aligned memory as ``x``."""
    flat = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())  # type: ignore[call-overload]
    return flat.to(device, copy=True).as_strided(x.size(), x.stride(), x.storage_offset())


def placed(x: Tensor, offset: int) -> Tensor:
    """``x`` in memory that begins ``offset`` elements past a multiple of 16 bytes."""
    room = torch.full((offset + x.numel() + 3,), torch.nan, dtype=x.dtype)
    return room[offset : offset + x.numel()].view(x.shape).copy_(x)


class Draw:
    """Draws tensors of one family, placed anywhere."""

    def __init__(self, draw_from: st.DrawFn) -> None:
        self.of = draw_from
        self.family, self.seed = self.of(families), self.of(seeds)

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype, family: str = "") -> Tensor:
        self.seed += 1
        return placed(draw(shape, dtype, self.seed, family or self.family), self.of(offsets))

    def integers(self, first: int, end: int, shape: tuple[int, ...]) -> Tensor:
        self.seed += 1
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(first, end, shape, generator=generator)


offsets = st.sampled_from([0, 0, 1, 2, 4, 7, 8])
few = st.integers(1, 4)
lengths = st.one_of(
    st.integers(1, 70),
    st.sampled_from([127, 128, 129, 255, 256, 257, 1023, 1024, 1025, 2049, 4095, 5000]),
)
"""Of rows: parts of a piece, of a warp's pieces, and more than one warp."""

ELEMENTARY = ("exp", "log", "sqrt", "tanh", "erf", "sigmoid", "rsqrt")
ACTIVATIONS = ("gelu", "gelu_erf", "silu")


def _elementary(name: str) -> Callable[[Draw], Case]:
    def case(x: Draw) -> Case:
        scale = x.of(st.sampled_from([1.0, 30.0, 1e20, 1e-30]))
        return Case(name, (placed(x((x.of(lengths),), torch.float32) * scale, x.of(offsets)),))

    return case


def _activation(name: str) -> Callable[[Draw], Case]:
    def case(x: Draw) -> Case:
        values = x((x.of(lengths),), x.of(dtypes))
        return Case(name, (placed(values * x.of(st.sampled_from([1, 8, 60])), x.of(offsets)),))

    return case


def _activation_backward(name: str) -> Callable[[Draw], Case]:
    def case(x: Draw) -> Case:
        shape, dtype = (x.of(lengths),), x.of(dtypes)
        values = placed(x(shape, dtype) * x.of(st.sampled_from([1, 8, 60])), x.of(offsets))
        return Case(f"{name}_backward", (x(shape, dtype), values))

    return case


def _swiglu(x: Draw) -> Case:
    shape, dtype = (x.of(few), x.of(lengths)), x.of(dtypes)
    return Case("swiglu", (x(shape, dtype), x(shape, dtype)))


def _swiglu_backward(x: Draw) -> Case:
    shape, dtype = (x.of(few), x.of(lengths)), x.of(dtypes)
    return Case("swiglu_backward", tuple(x(shape, dtype) for _ in range(3)))


def _adam_step(x: Draw) -> Case:
    shape = (x.of(lengths),)
    param, grad, exp_avg, square = (x(shape, torch.float32) for _ in range(4))
    options = {
        "lr": x.of(st.sampled_from([1e-3, 0.1])), "beta1": 0.9, "beta2": 0.95, "eps": 1e-8,
        "weight_decay": x.of(st.sampled_from([0.0, 0.1])),
        "bias_correction1": 0.1, "bias_correction2_sqrt": 0.3,
    }  # fmt: skip
    return Case("adam_step", (param, grad, exp_avg, square.abs()), options)


def _dropout(x: Draw) -> Case:
    shape, dtype = (x.of(few), x.of(lengths)), x.of(dtypes)
    ids = torch.tensor([x.of(st.integers(-(2**40), 2**40)) for _ in range(shape[0])])
    tail = (x.of(st.sampled_from([0.0, 0.3, 0.9])), x.of(st.integers(0, 2**64 - 1)), ids)
    if x.of(st.booleans()):
        return Case("dropout", (x(shape, dtype), *tail))
    return Case("dropout_add", (x(shape, dtype), x(shape, dtype), *tail))


def _tree_sum(x: Draw) -> Case:
    shape = tuple(x.of(st.lists(st.integers(0, 40), min_size=1, max_size=3)))
    dim = x.of(st.integers(0, len(shape) - 1))
    bias = None
    if dim + 1 < len(shape) and x.of(st.booleans()):
        bias = x(shape[-1:], x.of(dtypes))
    options = {"bias": bias, "out_dtype": x.of(dtypes)}
    return Case("tree_sum", (x(shape, x.of(dtypes)), dim), options)


def _row_sum(x: Draw) -> Case:
    return Case("row_sum", (x((x.of(few), x.of(st.one_of(st.just(0), lengths))), x.of(dtypes)),))


def _sum_of_squares(x: Draw) -> Case:
    return Case("sum_of_squares", (x((x.of(few), x.of(lengths)), torch.float32),))


def _token_block_sum(x: Draw) -> Case:
    num_blocks = x.of(few)
    shape = (num_blocks * x.of(st.integers(0, 33)), x.of(st.integers(1, 300)))
    return Case("token_block_sum", (x(shape, x.of(dtypes)), num_blocks))


def _count_zeros(x: Draw) -> Case:
    return Case("count_zeros", (x((x.of(few), x.of(lengths)), x.of(dtypes), "special"),))


def _layer_norm(x: Draw) -> Case:
    shape, dtype = (x.of(few), x.of(lengths)), x.of(dtypes)
    weights = (x(shape[1:], x.of(dtypes), "normal") for _ in range(2))
    return Case("layer_norm", (x(shape, dtype), *weights, 1e-5))


def _rms_norm(x: Draw) -> Case:
    shape = (x.of(few), x.of(lengths))
    weight = x(shape[1:], x.of(dtypes), "normal")
    return Case("rms_norm", (x(shape, x.of(dtypes)), weight, 1e-5))


def _norm_backward(name: str) -> Callable[[Draw], Case]:
    def case(x: Draw) -> Case:
        num_blocks, dtype = x.of(few), x.of(dtypes)
        shape = (num_blocks * x.of(st.integers(0, 9)), x.of(lengths))
        num_statistics = 2 if name == "layer_norm" else 1
        statistics = (x(shape[:1], torch.float32) for _ in range(num_statistics))
        weight = x(shape[1:], x.of(dtypes))
        args = (x(shape, dtype), x(shape, dtype), *statistics, weight, num_blocks)
        return Case(f"{name}_backward", args)

    return case


scales = st.sampled_from([1.0, 0.125, 0.3, -2.0])


def _attention(x: Draw) -> tuple[int, int, int]:
    side = x.of(st.one_of(st.integers(1, 20), st.sampled_from([33, 129])))
    return (x.of(st.integers(1, 2)), side, side)


def _softmax(x: Draw) -> Case:
    return Case("softmax", (x((x.of(few), x.of(lengths)), x.of(dtypes)), x.of(scales)))


def _softmax_backward(x: Draw) -> Case:
    shape, dtype = (x.of(few), x.of(lengths)), x.of(dtypes)
    return Case("softmax_backward", (x(shape, dtype), x(shape, dtype), x.of(scales)))


def _causal_softmax(x: Draw) -> Case:
    return Case("causal_softmax", (x(_attention(x), x.of(dtypes)), x.of(scales)))


def _causal_softmax_backward(x: Draw) -> Case:
    shape, dtype = _attention(x), x.of(dtypes)
    return Case("causal_softmax_backward", (x(shape, dtype), x(shape, dtype), x.of(scales)))


def _padded_softmax(x: Draw) -> Case:
    shape = _attention(x)
    visible = x.integers(1, shape[1] + 1, shape[:1])
    return Case("padded_softmax", (x(shape, x.of(dtypes)), visible, x.of(scales)))


def _padded_softmax_backward(x: Draw) -> Case:
    shape, dtype = _attention(x), x.of(dtypes)
    visible = x.integers(1, shape[1] + 1, shape[:1])
    args = (x(shape, dtype), x(shape, dtype), visible, x.of(scales))
    return Case("padded_softmax_backward", args)


def _logits(x: Draw) -> Tensor:
    shape = (x.of(st.integers(1, 8)), x.of(few), x.of(lengths))
    return x(shape, x.of(dtypes))


def _vocabulary_max(x: Draw) -> Case:
    return Case("vocabulary_max", (_logits(x),))


def _cross_entropy(x: Draw) -> Case:
    logits = _logits(x)
    parts, tokens, width = logits.shape
    return Case("cross_entropy", (logits, x.integers(0, parts * width, (tokens,))))


def _cross_entropy_sums(x: Draw) -> Case:
    """Of a shard in the middle of the vocabulary."""
    logits = _logits(x)
    parts, tokens, width = logits.shape
    targets = x.integers(0, 3 * parts * width, (tokens,))
    largest = canonical.vocabulary_max(logits)
    return Case("cross_entropy_sums", (logits, targets, largest, parts * width, 3 * parts * width))


def _cross_entropy_backward(x: Draw) -> Case:
    logits = _logits(x)
    parts, tokens, width = logits.shape
    targets = x.integers(0, 2 * parts * width, (tokens,))
    largest = canonical.vocabulary_max(logits)
    sums, _ = canonical.cross_entropy_sums(logits, targets, largest, 0, 2 * parts * width)
    grad = x((tokens,), torch.float32)
    args = (logits, targets, largest, sums, grad, parts * width, 2 * parts * width)
    return Case("cross_entropy_backward", args)


def _embedding(x: Draw) -> Case:
    shape = (x.of(few), x.of(st.integers(1, 5)), x.of(lengths))
    ids = x.integers(0, shape[0] * shape[1], (x.of(st.integers(0, 9)),))
    return Case("embedding", (ids, x(shape, x.of(dtypes))))


def _embedding_backward(x: Draw) -> Case:
    vocabulary, tokens = (x.of(few), x.of(st.integers(1, 5))), x.of(st.sampled_from([0, 1, 7, 300]))
    hidden = x.of(lengths) if tokens < 10 else x.of(st.integers(1, 20))
    ids = x.integers(0, vocabulary[0] * vocabulary[1], (tokens,))
    return Case(
        "embedding_backward", (x((tokens, hidden), x.of(dtypes)), ids, (*vocabulary, hidden))
    )


def _operand(x: Draw, num_batches: int, rows: int, columns: int) -> Tensor:
    """[num_batches, rows, columns], or without batches; with a gap after each row, or without."""
    gap = x.of(st.sampled_from([0, 0, 1, 8]))
    whole = x((num_batches, rows, columns + gap), x.of(dtypes))[..., :columns]
    return whole if num_batches > 1 or x.of(st.booleans()) else whole[0]


def _gemm(x: Draw) -> Case:
    side = st.one_of(st.integers(0, 20), st.sampled_from([31, 32, 33, 127, 128, 129]))
    m, n = x.of(side), x.of(side)
    k = x.of(st.one_of(st.integers(0, 40), st.sampled_from([64, 100])))
    num_batches = x.of(st.sampled_from([1, 1, 2, 3]))
    transpose_a, transpose_b = x.of(st.booleans()), x.of(st.booleans())
    shared = x.of(st.sampled_from(["neither", "a", "b"]))
    a = _operand(x, 1 if shared == "a" else num_batches, *((k, m) if transpose_a else (m, k)))
    b = _operand(x, 1 if shared == "b" else num_batches, *((n, k) if transpose_b else (k, n)))
    a, b = (t[0] if t.dim() == 3 and len(t) < num_batches else t for t in (a, b))
    batched = max(t.shape[0] if t.dim() == 3 else 1 for t in (a, b))
    bias = x.of(st.sampled_from([None, (n,), (batched, n)]))
    options = {
        "transpose_a": transpose_a, "transpose_b": transpose_b,
        "bias": None if bias is None else x(bias, x.of(dtypes)),
        "alpha": x.of(st.sampled_from([1.0, 0.125, 1 / 3])), "out_dtype": x.of(dtypes),
    }  # fmt: skip
    return Case("gemm", (a, b), options)


CASES: dict[str, Callable[[Draw], Case]] = {
    **{name: _elementary(name) for name in ELEMENTARY},
    **{name: _activation(name) for name in ACTIVATIONS},
    **{f"{name}_backward": _activation_backward(name) for name in ACTIVATIONS},
    **{f"{name}_backward": _norm_backward(name) for name in ("layer_norm", "rms_norm")},
    "adam_step": _adam_step,
    "causal_softmax": _causal_softmax,
    "causal_softmax_backward": _causal_softmax_backward,
    "count_zeros": _count_zeros,
    "cross_entropy": _cross_entropy,
    "cross_entropy_backward": _cross_entropy_backward,
    "cross_entropy_sums": _cross_entropy_sums,
    "dropout": _dropout,
    "embedding": _embedding,
    "embedding_backward": _embedding_backward,
    "gemm": _gemm,
    "layer_norm": _layer_norm,
    "padded_softmax": _padded_softmax,
    "padded_softmax_backward": _padded_softmax_backward,
    "rms_norm": _rms_norm,
    "row_sum": _row_sum,
    "softmax": _softmax,
    "softmax_backward": _softmax_backward,
    "sum_of_squares": _sum_of_squares,
    "swiglu": _swiglu,
    "swiglu_backward": _swiglu_backward,
    "token_block_sum": _token_block_sum,
    "tree_sum": _tree_sum,
    "vocabulary_max": _vocabulary_max,
}
WITHOUT_A_CASE = {"cross_entropy_loss", "dropout_add", "random_normal"}
"""Of ``canonical.__all__``: made of others, drawn with ``dropout``, without a tensor to go by."""


@st.composite
def cases(draw_from: st.DrawFn, name: str) -> Case:
    """A random call of the function of this name."""
    return CASES[name](Draw(draw_from))


def every_float(dtype: torch.dtype) -> Tensor:
    """All values of a 16-bit dtype, or one float32 in 40,009."""
    if dtype == torch.float32:
        bits = torch.arange(-(2**31), 2**31, 40009, dtype=torch.int64).to(torch.int32)
        return bits.view(torch.float32)
    return torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)


def sweeps() -> list[Case]:
    """The functions of one element over all exponents; all roundings of a store."""
    found = [Case(name, (every_float(torch.float32),)) for name in ELEMENTARY]
    for dtype in DTYPES:
        x = every_float(dtype)
        for name in ACTIVATIONS:
            found += [Case(name, (x,)), Case(f"{name}_backward", (torch.ones_like(x), x))]
        found += [Case("tree_sum", (x[None],), {"out_dtype": out}) for out in DTYPES]
    return found
