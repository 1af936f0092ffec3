"""The choice of a token from its logits: the same on every machine and in every layout."""

import numpy as np
import torch
from torch import Tensor

from primitives.arithmetic import kernels
from scenarios.inference.request import Sampling
from scenarios.parallel.random_keys import random_key


def choose(logits: Tensor, sampling: Sampling, request_id: str, position: int) -> int:
    """The token at a position of a request.

    Args:
        logits: [vocabulary] fp32, all finite.
        sampling: temperature, top-k, top-p and seed.
        request_id, position: key of the draw, with the seed.

    Numerics: greedy is the largest logit, of equal ones the first. Else the tokens are sorted by
    falling logit, equal ones by id, and cut to top_k; p = canonical softmax(logit / temperature) in
    fp32; running sums of p in fp64, in this order; cut after the first that reaches top_p of the
    whole; the first token whose sum exceeds u times the last sum, u = key / 2^63.
    """
    if sampling.temperature == 0.0 or sampling.top_k == 1:
        return int(logits.argmax())
    order = torch.argsort(logits, descending=True, stable=True)
    if sampling.top_k:
        order = order[: sampling.top_k]
    scaled = logits[order] / torch.tensor(sampling.temperature)
    sums = np.add.accumulate(kernels.softmax(scaled[None])[0].numpy().astype(np.float64))
    kept = int(np.searchsorted(sums, sampling.top_p * sums[-1], side="left")) + 1
    sums = sums[:kept]
    u = random_key(sampling.seed, "sample", request_id, position) / 2**63
    place = int(np.searchsorted(sums, u * sums[-1], side="right"))
    return int(order[min(place, len(sums) - 1)])
