"""The canonical functions written down a second time: slow numpy float32, one rounding a step.

Shares nothing with the kernels. numpy's + - * / and sqrt are correctly rounded; fma is built from
float64 with the sticky bit set (round to odd), which makes the second rounding harmless.
"""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats: TypeAlias = NDArray[np.float32]
F = np.float32
NAN_BITS = {torch.float32: 0x7FC00000, torch.float16: 0x7E00, torch.bfloat16: 0x7FC0}
INT_OF = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def constant(bits: int) -> np.float32:
    """The float32 with these bits."""
    return np.uint32(bits).view(F)


def widened(x: Tensor) -> Floats:
    """Any T as float32, exactly."""
    return x.detach().float().numpy()


def rounded(x: Floats, dtype: torch.dtype) -> Tensor:
    """float32 to ``dtype``, nearest even, with the one NaN."""
    result = torch.from_numpy(np.array(x, dtype=F)).to(dtype)
    result.view(INT_OF[dtype])[result.isnan()] = NAN_BITS[dtype]
    return result


def fma(a: Floats | np.float32, b: Floats | np.float32, c: Floats | np.float32) -> Floats:
    """a * b + c with one rounding."""
    product = np.asarray(a, np.float64) * np.asarray(b, np.float64)  # exact: 48 bits
    addend = np.broadcast_to(np.asarray(c, np.float64), product.shape)
    product = np.broadcast_to(product, np.broadcast_shapes(product.shape, np.shape(c)))
    addend = np.broadcast_to(addend, product.shape)
    total = np.array(product + addend)
    part = total - product
    error = (product - (total - part)) + (addend - part)
    bits = total.view(np.int64)
    inexact = np.isfinite(total) & (error != 0) & (bits & 1 == 0)
    toward = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
    total = np.where(inexact, toward, total)
    return total.astype(F)


def tree(x: Floats, axis: int = -1) -> Floats:
    """Adjacent pairs, an odd last element carried up; +0 for nothing."""
    x = np.moveaxis(np.asarray(x, F), axis, 0)
    if len(x) == 0:
        return np.zeros(x.shape[1:], F)
    while len(x) > 1:
        pairs = x[0 : len(x) // 2 * 2 : 2] + x[1::2]
        x = np.concatenate([pairs, x[-1:]]) if len(x) % 2 else pairs
    return x[0]


def gemm(a: Floats, b: Floats, alpha: float, bias: Floats | None) -> Floats:
    """[.., M, K] x [.., K, N]: a chain of fma over k."""
    shape = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    c = np.zeros((*shape, a.shape[-2], b.shape[-1]), F)
    for k in range(a.shape[-1]):
        c = fma(a[..., :, k : k + 1], b[..., k : k + 1, :], c)
    if F(alpha) != 1:
        c = c * F(alpha)
    if bias is not None:
        c = c + (bias[..., None, :] if bias.ndim == 2 else bias)
    return c


def horner(x: Floats, coefficients: list[float]) -> Floats:
    result = np.full_like(x, F(coefficients[0]))
    for coefficient in coefficients[1:]:
        result = fma(result, x, F(coefficient))
    return result


def scaled(x: Floats, exponent: NDArray[np.int32]) -> Floats:
    """x * 2^exponent for exponents of normal numbers."""
    return x * ((exponent.astype(np.int32) + 127) << 23).astype(np.int32).view(F)


def exp_nonpositive(x: Floats) -> Floats:
    d = np.where(x < F(-87.5), F(-87.5), x)
    t = fma(d, constant(0x3FB8AA3B), F(12583038))
    r = fma(t - F(12583038), -constant(0x3F317218), d)
    bits = [0x3B3511E7, 0x3C891D10, 0x3DAAAC7A, 0x3EAAAA49, 0x3F7FFFFE, 0x40000000, 0x40000000]
    return horner(r, [float(constant(b)) for b in bits]) * (t.view(np.int32) << 23).view(F)


def exp(x: Floats) -> Floats:
    c = np.where(x < F(-104), F(-104), x)
    c = np.where(c > F(89), F(89), c)
    n = fma(c, constant(0x3FB8AA3B), F(12582912)) - F(12582912)
    r = fma(n, F(2.12194440e-4), fma(n, F(-0.693359375), c))
    p = horner(r, [1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2])
    p = fma(fma(p, r, F(1.6666665459e-1)), r, F(5.0000001201e-1))
    y = fma(p, r * r, r) + F(1)
    k = np.nan_to_num(n).astype(np.int32)
    half = k >> 1
    return scaled(scaled(y, half), k - half)


def log(x: Floats) -> Floats:
    tiny = x < F(1.17549435e-38)
    a = np.where(x > 0, np.where(tiny, x * F(2**23), x), F(1)).astype(F)
    bits = a.view(np.int32)
    exponent = (bits - 0x3F3504F3) >> 23
    e = exponent.astype(F) - np.where(tiny, F(23), F(0))
    f = (bits - (exponent << 23)).view(F) - F(1)
    z = f * f
    p = horner(f, [7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1])
    for coefficient in (1.4249322787e-1, -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1):
        p = fma(p, f, F(coefficient))
    y = fma(p, f, F(3.3333331174e-1))
    y = fma(z, F(-0.5), fma(e, F(-2.12194440e-4), (y * f) * z))
    result = fma(e, F(0.693359375), f + y)
    result = np.where(x == F(np.inf), x, result)
    result = np.where(x == 0, F(-np.inf), result)
    return np.where(x >= 0, result, F(np.nan))


def tanh(x: Floats) -> Floats:
    a, z = np.abs(x), x * x
    p = horner(z, [-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2])
    p = fma(fma(p, z, F(1.33314422036e-1)), z, F(-3.33332819422e-1))
    small = np.where(x == 0, x, fma(p * z, x, x))
    large = F(1) - F(2) / (exp(a + a) + F(1))
    return np.where(a < F(0.625), small, np.where(x < 0, -large, large))


def erf(x: Floats) -> Floats:
    a, z = np.abs(x), x * x
    p = horner(z, [-5.96761703e-4, 4.99119423e-3, -2.67681349e-2, 1.12819925e-1])
    p = fma(fma(p, z, F(-3.76125336e-1)), z, F(1.28379166e-1))
    u = horner(a, [-3.88396438e-3, 2.42546219e-2])
    q = fma(horner(a, [-1.72853470e-5, 3.83197126e-4]), z, u)
    for coefficient in (-1.06777877e-1, -6.34846687e-1, -1.28717512e-1):
        q = fma(q, a, F(coefficient))
    large = F(1) - exp(fma(q, a, -a))
    return np.where(a > F(0.927734375), np.where(x < 0, -large, large), fma(p, x, x))


def sigmoid(x: Floats) -> Floats:
    e = exp(-np.abs(x))
    s = F(1) / (e + F(1))
    return np.where(x < 0, e * s, s)


def rsqrt(x: Floats) -> Floats:
    return F(1) / np.sqrt(x)


def layer_norm(x: Floats, w: Floats, b: Floats, eps: float) -> tuple[Floats, Floats, Floats]:
    h = F(x.shape[1])
    mean = tree(x) / h
    d = x - mean[:, None]
    rstd = F(1) / np.sqrt(tree(d * d) / h + F(eps))
    return fma(d * rstd[:, None], w, b), mean, rstd


def layer_norm_backward(
    dy: Floats, x: Floats, mean: Floats, rstd: Floats, w: Floats, num_blocks: int
) -> tuple[Floats, Floats, Floats]:
    h = F(x.shape[1])
    n = (x - mean[:, None]) * rstd[:, None]
    g = dy * w
    a, c = tree(g) / h, tree(g * n) / h
    dx = fma(n, -c[:, None], g - a[:, None]) * rstd[:, None]
    blocks = (num_blocks, -1, x.shape[1])
    return dx, tree((dy * n).reshape(blocks), 1), tree(dy.reshape(blocks), 1)


def rms_norm(x: Floats, w: Floats, eps: float) -> tuple[Floats, Floats]:
    rstd = F(1) / np.sqrt(tree(x * x) / F(x.shape[1]) + F(eps))
    return (x * rstd[:, None]) * w, rstd


def rms_norm_backward(
    dy: Floats, x: Floats, rstd: Floats, w: Floats, num_blocks: int
) -> tuple[Floats, Floats]:
    n = x * rstd[:, None]
    g = dy * w
    c = tree(g * n) / F(x.shape[1])
    dx = fma(n, -c[:, None], g) * rstd[:, None]
    return dx, tree((dy * n).reshape(num_blocks, -1, x.shape[1]), 1)


def gelu_exp(x: Floats) -> Floats:
    return exp(fma((x * x) * x, F(0.044715), x) * F(-1.59576912))


def gelu(x: Floats) -> Floats:
    return x * (F(1) / (gelu_exp(x) + F(1)))


def gelu_backward(dy: Floats, x: Floats) -> Floats:
    v = np.where(x < F(-10), F(-10), np.where(x > F(10), F(10), x)).astype(F)
    e = gelu_exp(v)
    s = F(1) / (e + F(1))
    slope = fma(v * v, F(0.21406444), F(1.59576912))
    return dy * fma((v * s) * (e * s), slope, s)


def normal_cdf(x: Floats) -> Floats:
    return fma(erf(x * F(0.707106769)), F(0.5), F(0.5))


def gelu_erf(x: Floats) -> Floats:
    return x * normal_cdf(x)


def gelu_erf_backward(dy: Floats, x: Floats) -> Floats:
    v = np.where(x < F(-10), F(-10), np.where(x > F(10), F(10), x)).astype(F)
    density = exp((v * v) * F(-0.5)) * F(0.398942292)
    return dy * fma(v, density, normal_cdf(v))


def silu(x: Floats) -> Floats:
    return x * sigmoid(x)


def silu_derivative(x: Floats) -> Floats:
    v = np.where(x < F(-104), F(-104), np.where(x > F(104), F(104), x)).astype(F)
    e = exp(-np.abs(v))
    s = F(1) / (e + F(1))
    return fma(v, (e * s) * s, sigmoid(v))


def causal(length: int) -> NDArray[np.bool_]:
    return np.tril(np.ones((length, length), bool))


def unpadded(visible: NDArray[np.int64], length: int) -> NDArray[np.bool_]:
    return np.arange(length) < visible[:, None, None]


def masked_softmax(s: Floats, mask: NDArray[np.bool_], scale: float) -> Floats:
    z = s * F(scale)
    m = np.where(mask, z, F(-np.inf)).max(-1, keepdims=True) + F(0)
    e = np.where(mask, exp_nonpositive(z - m), F(0)).astype(F)
    return np.where(mask, e * (F(1) / tree(e))[..., None], F(0)).astype(F)


def masked_softmax_backward(dp: Floats, p: Floats, mask: NDArray[np.bool_], scale: float) -> Floats:
    total = tree(np.where(mask, p * dp, F(0)).astype(F))[..., None]
    return np.where(mask, (p * (dp - total)) * F(scale), F(0)).astype(F)


def cross_entropy(z: Floats, targets: NDArray[np.int64]) -> tuple[Floats, Floats, Floats]:
    width = z.shape[2]
    m = z.max(axis=(0, 2)) + F(0)
    total = tree(tree(exp_nonpositive(z - m[None, :, None])), 0)
    target = z[targets // width, np.arange(len(targets)), targets % width]
    return log(total) - (target - m), m, total


def cross_entropy_backward(
    z: Floats, targets: NDArray[np.int64], m: Floats, total: Floats, grad: Floats
) -> Floats:
    width = z.shape[2]
    p = exp_nonpositive(z - m[None, :, None]) * (F(1) / total)[None, :, None]
    p[targets // width, np.arange(len(targets)), targets % width] -= F(1)
    return p * grad[None, :, None]


def philox(key: int, counter: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 on Python integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            (p1 >> 32) ^ c1 ^ k0,
            p1 & 0xFFFFFFFF,
            (p0 >> 32) ^ c3 ^ k1,
            p0 & 0xFFFFFFFF,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def random_normal(n: int, key: int, first_index: int) -> Floats:
    out = np.empty(n, F)
    for i in range(n):
        index = (first_index + i) % 2**64
        low, high = index & 0xFFFFFFFF, index >> 32
        words = (*philox(key, (low, high, 0, 0)), *philox(key, (low, high, 1, 0))[:2])
        total = sum((w & 0xFFFF) + (w >> 16) for w in words) - 393210
        out[i] = F(total) / F(65536)
    return out


def dropout(
    x: Floats, residual: Floats | None, probability: float, key: int, row_ids: list[int]
) -> Floats:
    scale = F(1.0 / (1.0 - probability))
    out = np.zeros_like(x)
    for r, row_id in enumerate(row_ids):
        high, low = (row_id % 2**64) >> 32, row_id & 0xFFFFFFFF
        for c in range(x.shape[1]):
            word = philox(key, (c // 4, 0, low, high))[c % 4]
            if word >= int(probability * 2**32):
                out[r, c] = x[r, c] * scale
    return out if residual is None else residual + out


def adam_step(
    p: Floats, g: Floats, m: Floats, v: Floats, hyper: dict[str, float]
) -> tuple[Floats, Floats, Floats]:
    beta1, beta2 = hyper["beta1"], hyper["beta2"]
    m = fma(g, F(1 - beta1), m * F(beta1))
    v = fma(g * g, F(1 - beta2), v * F(beta2))
    denominator = np.sqrt(v) / F(hyper["bias_correction2_sqrt"]) + F(hyper["eps"])
    decayed = p * F(1 - hyper["lr"] * hyper["weight_decay"])
    step = F(-(hyper["lr"] / hyper["bias_correction1"]))
    return fma(m / denominator, step, decayed), m, v


def assert_same_bits(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """Fails with the first element whose bits differ."""
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: {actual.shape}, expected {expected.shape}"
    kind = INT_OF[actual.dtype]
    wrong = actual.contiguous().view(kind) != expected.contiguous().view(kind)
    if wrong.any():
        where = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} elements differ, first at {where}: "
            f"got {actual[where].item()!r}, expected {expected[where].item()!r}"
        )


def assert_detected(wrong: Callable[[], Floats], actual: Tensor) -> None:
    """Fails unless the comparison with a wrong definition fails."""
    try:
        assert_same_bits(actual, rounded(wrong(), actual.dtype))
    except AssertionError:
        return
    raise AssertionError("a wrong definition was not told from the right one")
