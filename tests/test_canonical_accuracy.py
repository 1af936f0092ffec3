"""Canonical kernels are no farther from float64 than docs/canonical-arithmetic.md says.

The document's error table is read here, so a bound cannot be stated and not tested, or the reverse.
Errors are in units of 2^-24 of the natural size of a result (named in the table), so about in ulps.
"""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from primitives import canonical

DOCUMENT = Path(__file__).parent.parent / "docs" / "canonical-arithmetic.md"
UNIT = 2.0**-24


def stated_bounds() -> dict[str, float]:
    """The rows `| name | size | measured | bound |` of the document's error table."""
    rows = re.findall(r"^\| `([a-z_ ]+)` \|.*\| ([0-9.]+) \|$", DOCUMENT.read_text(), re.MULTILINE)
    return {name: float(bound) for name, bound in rows}


def error(actual: Tensor, exact: Tensor, size: Tensor) -> float:
    """The largest |actual - exact| / size in units of 2^-24."""
    assert actual.shape == exact.shape
    assert actual.isfinite().all()
    return float(((actual.double() - exact).abs() / size).max()) / UNIT


def ulps(actual: Tensor, exact: Tensor) -> float:
    """The largest error in units of the last place of the exact result."""
    nearest = exact.float().abs()
    spacing = (torch.nextafter(nearest, torch.tensor(torch.inf)) - nearest).double()
    return float(((actual.double() - exact).abs() / spacing).max())


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer_norm_errors() -> dict[str, float]:
    x, w, b, dy = normal(64, 500), normal(500, seed=1), normal(500, seed=2), normal(64, 500, seed=3)
    y, mean, rstd = canonical.layer_norm(x, w, b, 1e-5)
    leaves = [t.double().requires_grad_() for t in (x, w, b)]
    exact = functional.layer_norm(leaves[0], (500,), leaves[1], leaves[2], 1e-5)
    exact.backward(dy.double())
    dx, dw, db = canonical.layer_norm_backward(dy, x, mean, rstd, w, 8)
    gx, gw, gb = (leaf.grad for leaf in leaves)
    assert gx is not None
    assert gw is not None
    assert gb is not None
    terms = dy.double().abs()
    return {
        "layer_norm": error(y, exact.detach(), (exact - leaves[2]).detach().abs() + b.abs()),
        "layer_norm dx": error(dx, gx, (dy * w).double().abs().amax(1, keepdim=True)),
        "layer_norm dweight": error(dw.double().sum(0), gw, (terms * x.abs()).sum(0)),
        "layer_norm dbias": error(db.double().sum(0), gb, terms.sum(0)),
    }


def rms_norm_errors() -> dict[str, float]:
    x, w, dy = normal(64, 500), normal(500, seed=1), normal(64, 500, seed=3)
    y, rstd = canonical.rms_norm(x, w, 1e-5)
    leaves = [t.double().requires_grad_() for t in (x, w)]
    exact = functional.rms_norm(leaves[0], (500,), leaves[1], 1e-5)
    exact.backward(dy.double())
    dx, dw = canonical.rms_norm_backward(dy, x, rstd, w, 8)
    gx, gw = (leaf.grad for leaf in leaves)
    assert gx is not None
    assert gw is not None
    return {
        "rms_norm": error(y, exact.detach(), exact.detach().abs()),
        "rms_norm dx": error(dx, gx, (dy * w).double().abs().amax(1, keepdim=True)),
        "rms_norm dweight": error(dw.double().sum(0), gw, (dy * x).double().abs().sum(0)),
    }


def softmax_errors() -> dict[str, float]:
    scores, dprobs = normal(16, 48, 48) * 4, normal(16, 48, 48, seed=1)
    visible = torch.arange(16) * 3 + 1
    causal = canonical.causal_softmax(scores, 0.25)
    padded = canonical.padded_softmax(scores, visible, 0.25)
    plain = canonical.softmax(scores, 0.25)
    cases = {
        "softmax": (
            torch.zeros_like(scores, dtype=torch.bool),
            plain,
            canonical.softmax_backward(dprobs, plain, 0.25),
        ),
        "causal_softmax": (
            torch.ones(48, 48, dtype=torch.bool).triu(1).expand_as(scores),
            causal,
            canonical.causal_softmax_backward(dprobs, causal, 0.25),
        ),
        "padded_softmax": (
            (torch.arange(48) >= visible[:, None, None]).expand_as(scores),
            padded,
            canonical.padded_softmax_backward(dprobs, padded, visible, 0.25),
        ),
    }
    errors = {}
    for name, (hidden, probs, gradient) in cases.items():
        leaf = scores.double().requires_grad_()
        exact = (leaf * 0.25).masked_fill(hidden, -torch.inf).softmax(-1)
        exact.backward(dprobs.double())
        assert leaf.grad is not None
        p = exact.detach()[~hidden]
        size = p * dprobs.abs().max()
        errors[name] = error(probs[~hidden], p, p)
        errors[f"{name} backward"] = error(gradient[~hidden], leaf.grad[~hidden], size)
    return errors


def cross_entropy_errors() -> dict[str, float]:
    logits, targets, grad = normal(8, 40, 100) * 3, torch.arange(40) * 19, normal(40, seed=1).abs()
    leaf = logits.double().requires_grad_()
    flat = leaf.transpose(0, 1).reshape(40, 800)
    exact = functional.cross_entropy(flat, targets, reduction="none")
    exact.backward(grad.double())
    loss, largest, total = canonical.cross_entropy(logits, targets)
    got = canonical.cross_entropy_backward(logits, targets, largest, total, grad)
    assert leaf.grad is not None
    return {
        "cross_entropy": error(loss, exact.detach(), exact.detach().abs() + 1),
        "cross_entropy backward": error(got, leaf.grad, grad.double()[:, None].expand(40, 100)),
    }


def elementwise_errors() -> dict[str, float]:
    x = torch.linspace(-87, 88, 400_001)
    tiny = torch.linspace(-103, -87, 20_001)
    positive = torch.logspace(-44, 38, 400_001, dtype=torch.float64).float()
    positive = torch.cat([positive, torch.linspace(0.5, 2, 100_001)])
    t = torch.linspace(-12, 12, 400_001)
    e = torch.linspace(-6, 6, 400_001)
    s = torch.linspace(-87, 20, 400_001)
    return {
        "exp": ulps(canonical.exp(x), x.double().exp()),
        "exp subnormal": ulps(canonical.exp(tiny), tiny.double().exp()),
        "log": ulps(canonical.log(positive), positive.double().log()),
        "tanh": ulps(canonical.tanh(t), t.double().tanh()),
        "erf": ulps(canonical.erf(e), e.double().erf()),
        "sigmoid": ulps(canonical.sigmoid(s), s.double().sigmoid()),
        "sigmoid subnormal": ulps(canonical.sigmoid(tiny), tiny.double().sigmoid()),
        "sqrt": ulps(canonical.sqrt(positive), positive.double().sqrt()),
        "rsqrt": ulps(canonical.rsqrt(positive), positive.double().rsqrt()),
    }


def gelu_errors() -> dict[str, float]:
    x, dy = torch.linspace(-12, 12, 200_001), normal(200_001)
    errors = {}
    for name, approximate in (("gelu", "tanh"), ("gelu_erf", "none")):
        leaf = x.double().requires_grad_()
        exact = functional.gelu(leaf, approximate=approximate)
        exact.backward(dy.double())
        assert leaf.grad is not None
        forward, backward = getattr(canonical, name), getattr(canonical, f"{name}_backward")
        errors[name] = error(forward(x), exact.detach(), x.double().abs() + UNIT)
        errors[f"{name} backward"] = error(backward(dy, x), leaf.grad, dy.double().abs())
    return errors


def silu_errors() -> dict[str, float]:
    x = torch.cat([torch.linspace(-80, 80, 200_001), torch.linspace(-8, 8, 200_000)])
    dy, value = normal(x.numel()), normal(x.numel(), seed=1)
    leaves = [t.double().requires_grad_() for t in (x, value)]
    silu = functional.silu(leaves[0])
    (slope,) = torch.autograd.grad(silu.sum(), leaves[0], retain_graph=True)
    exact = silu * leaves[1]
    exact.backward(dy.double())
    dgate, dvalue = canonical.swiglu_backward(dy, x, value)
    gate_gradient, value_gradient = (leaf.grad for leaf in leaves)
    assert gate_gradient is not None
    assert value_gradient is not None
    silu, exact, size = silu.detach(), exact.detach(), dy.double().abs()
    return {
        "silu": ulps(canonical.silu(x), silu),
        "silu backward": error(canonical.silu_backward(dy, x), slope * dy, size),
        "swiglu": error(canonical.swiglu(x, value), exact, exact.abs() + UNIT**4),
        "swiglu dgate": error(dgate, gate_gradient, size * value.abs()),
        "swiglu dvalue": error(dvalue, value_gradient, value_gradient.abs() + UNIT**4),
    }


def sum_errors() -> dict[str, float]:
    a, b = normal(60, 512), normal(512, 60, seed=1)
    x = normal(1000, 64)
    p, g, m, v = normal(1000), normal(1000, seed=1), normal(1000, seed=2), normal(1000, seed=3) ** 2
    start = [t.double() for t in (p, m, v)]
    canonical.adam_step(p, g, m, v, lr=0.01, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1,
                        bias_correction1=0.1, bias_correction2_sqrt=0.1)  # fmt: skip
    exact_m = start[1] * 0.9 + g.double() * 0.1
    exact_v = start[2] * 0.99 + g.double() ** 2 * 0.01
    update = 0.01 / 0.1 * exact_m / (exact_v.sqrt() / 0.1 + 1e-8)
    exact_p = start[0] * (1 - 0.01 * 0.1) - update
    return {
        "gemm": error(canonical.gemm(a, b), a.double() @ b.double(), (a.abs() @ b.abs()).double()),
        "tree_sum": error(canonical.tree_sum(x), x.double().sum(0), x.double().abs().sum(0)),
        "adam_step": error(p, exact_p, start[0].abs() + update.abs()),
    }


GROUPS: list[Callable[[], dict[str, float]]] = [
    elementwise_errors,
    gelu_errors,
    silu_errors,
    layer_norm_errors,
    rms_norm_errors,
    softmax_errors,
    cross_entropy_errors,
    sum_errors,
]


@pytest.mark.parametrize("group", GROUPS)
def test_errors_stay_within_the_document(group: Callable[[], dict[str, float]]) -> None:
    bounds = stated_bounds()
    for name, measured in group().items():
        assert measured <= bounds[name], f"{name}: {measured:.3f}, stated bound {bounds[name]}"
        assert bounds[name] <= 4 * measured + 0.01, f"{name}: bound {bounds[name]} says nothing"


def test_every_stated_bound_is_tested() -> None:
    assert stated_bounds().keys() == {name for group in GROUPS for name in group()}


def test_a_wrong_gradient_exceeds_its_bound() -> None:
    """LayerNorm's dx without the term that removes the mean."""
    x, w, dy = normal(64, 500), normal(500, seed=1), normal(64, 500, seed=3)
    _, _, rstd = canonical.layer_norm(x, w, w, 1e-5)
    leaf = x.double().requires_grad_()
    functional.layer_norm(leaf, (500,), w.double(), None, 1e-5).backward(dy.double())
    assert leaf.grad is not None
    wrong = dy * w * rstd[:, None]
    size = (dy * w).double().abs().amax(1, keepdim=True)
    assert error(wrong, leaf.grad, size) > 1000 * stated_bounds()["layer_norm dx"]


def test_random_normal_has_the_moments_of_a_normal() -> None:
    x = canonical.random_normal((200_000,), 5).double()
    assert abs(float(x.mean())) < 0.01
    assert abs(float((x**2).mean()) - 1) < 0.01
    assert abs(float((x**3).mean())) < 0.02
    assert abs(float((x**4).mean()) - 2.9) < 0.06  # 3 - 6 / 5 / 12: twelve uniforms
    assert abs(float((x[1:] * x[:-1]).mean())) < 0.01
