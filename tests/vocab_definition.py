"""The vocabulary entropy written down a second time: slow numpy float32, one rounding a step."""

from dataclasses import dataclass

import numpy as np
from canonical_definition import F, Floats, exp_nonpositive, fma, log
from numpy.typing import NDArray

NUM_SEGMENTS = 16
BLOCK, COLUMNS = 1024, 64


@dataclass
class Quad:
    """Of each token's run of the vocabulary, [tokens] each: sums relative to the maximum."""

    max: Floats
    sum: Floats
    weighted: Floats


def shifted(x: Floats, largest: Floats, scale: np.float32) -> Floats:
    """(x - largest) * scale, no less than -87.5; a maximum of -inf shifts by 0."""
    d = (x - np.where(largest == F(-np.inf), F(0), largest)) * scale
    return np.where(d < F(-87.5), F(-87.5), d)


def fold(x: Floats) -> Floats:
    """The sum over the last dimension, a power of two: x[i] + x[i + half], again and again."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x[..., 0]


def block_quad(z: Floats, scale: np.float32) -> Quad:
    """Of up to 1024 logits, [tokens, n]: 16 rows of 64 columns, summed row by row."""
    padded = np.full((len(z), BLOCK), -np.inf, F)
    padded[:, : z.shape[1]] = z
    m = padded.max(1) + F(0)
    d = shifted(padded, m[:, None], scale).reshape(len(z), -1, COLUMNS)
    e = exp_nonpositive(d)
    s, t = e[:, 0], d[:, 0] * e[:, 0]
    for row in range(1, d.shape[1]):
        s, t = s + e[:, row], fma(d[:, row], e[:, row], t)
    return Quad(m, fold(s), fold(t))


def segment_quad(z: Floats, scale: np.float32) -> Quad:
    """Of a whole segment, [tokens, n]."""
    if z.shape[1] == 0:
        zeros = np.zeros(len(z), F)
        return Quad(np.full(len(z), -np.inf, F), zeros, zeros)
    blocks = [block_quad(z[:, i : i + BLOCK], scale) for i in range(0, z.shape[1], BLOCK)]
    m = np.max([b.max for b in blocks], axis=0)
    s, t = [], []
    for b in blocks:
        d = shifted(b.max, m, scale)
        f = exp_nonpositive(d)
        s.append(b.sum * f)
        t.append(fma(d, b.sum, b.weighted) * f)
    while len(s) & (len(s) - 1):
        s.append(np.zeros(len(z), F))
        t.append(np.zeros(len(z), F))
    return Quad(m, fold(np.stack(s, -1)), fold(np.stack(t, -1)) + F(0))


def combined(a: Quad, b: Quad, scale: np.float32) -> Quad:
    """Two neighbours in one."""
    m = np.maximum(a.max, b.max)
    da, db = shifted(a.max, m, scale), shifted(b.max, m, scale)
    fa, fb = exp_nonpositive(da), exp_nonpositive(db)
    t = fma(fma(db, b.sum, b.weighted), fb, fma(da, a.sum, a.weighted) * fa)
    return Quad(m, fma(b.sum, fb, a.sum * fa), t)


def quad_of(z: Floats, scale: np.float32) -> Quad:
    """Of the whole vocabulary, [tokens, vocab]."""
    length = -(-z.shape[1] // NUM_SEGMENTS)
    quads = [segment_quad(z[:, i * length : (i + 1) * length], scale) for i in range(NUM_SEGMENTS)]
    while len(quads) > 1:
        quads = [combined(a, b, scale) for a, b in zip(quads[::2], quads[1::2], strict=True)]
    return quads[0]


def results(
    z: Floats, labels: NDArray[np.int64], ignored: int, scale: np.float32
) -> tuple[Quad, Floats, Floats, Floats]:
    """The quad, entropy, log_prob and log_sum_exp of each token."""
    q = quad_of(z, scale)
    log_sum = log(q.sum)
    has_target = labels != ignored
    target = z[np.arange(len(z)), np.where(has_target, labels, 0)]
    log_prob = np.where(has_target, (target - q.max) * scale - log_sum, F(0))
    return q, log_sum - q.weighted / q.sum, log_prob, q.max * scale + log_sum


def gradient(
    z: Floats, labels: NDArray[np.int64], ignored: int, g: Floats, scale: np.float32
) -> Floats:
    """By z, before rounding; g [3, tokens]: by entropy, log_prob and log_sum_exp."""
    q, entropy, _, _ = results(z, labels, ignored, scale)
    has_target = labels != ignored
    g_entropy, g_log_prob, g_lse = g[0], np.where(has_target, g[1], F(0)), g[2]
    inverse = scale / q.sum
    a = ((g_lse - g_log_prob) - g_entropy * (entropy - log(q.sum))) * inverse
    b = -g_entropy * inverse
    d = shifted(z, q.max[:, None], scale)
    grad = exp_nonpositive(d) * fma(b[:, None], d, a[:, None])
    rows = np.arange(len(z))[has_target]
    grad[rows, labels[has_target]] += (g_log_prob * scale)[has_target]
    grad[(g_entropy == 0) & (g_log_prob == 0) & (g_lse == 0)] = F(0)
    return grad
