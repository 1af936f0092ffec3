"""The forward pass of one pipeline stage over the tokens of one step.

[Note: same bits as training] The layers are those of training, and every row of every kernel is
independent of the others, so only attention needs a word. Its scores are chains over the head's
width. The tree over a row's exponentials stays the same when +0 follow, whatever their number,
because no exponential is -0. The chain of a row's P V goes over positions in their order, from the
first on; in training exact zeros follow it, and adding them changes nothing but, if the chain
underflowed to -0, the sign of that zero. The sign of a zero never becomes another difference: no
kernel divides by such a value, a chain begins with +0, and a maximum has + 0.0. So
log-probabilities are equal in all bits, and so are logits after + 0.0. Values must be finite.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from primitives.arithmetic import kernels
from scenarios.inference.kv_cache import BlockManager, KvCache
from scenarios.inference.scheduler import Segment
from scenarios.models.gpt import Gpt, TransformerLayer
from scenarios.models.mlp import Mlp
from scenarios.parallel.attention import SelfAttention
from scenarios.parallel.layers import dropout_add
from scenarios.parallel.mesh import Mesh
from scenarios.parallel.microbatch import Microbatch
from scenarios.parallel.vocabulary import look_up


class _NoGradients:
    """There is no backward pass."""

    def push(self, name: str, microbatch: int, gradient: Tensor) -> None:
        raise AssertionError(f"inference made a gradient of {name}")


@dataclass(frozen=True)
class _Attended:
    """Rows of a step whose queries see contexts of one padded length."""

    rows: Tensor
    """[requests * queries] int64: rows of the step, request after request."""
    context: Tensor
    """[requests * context] int64: slots, request after request."""
    hidden: Tensor
    """[requests, queries, context] bool: what a query does not see."""


class StepBatch:
    """The tokens of one step as a microbatch of samples of length one.

    Args:
        segments: as the scheduler planned them.
        blocks: where their keys and values lie.
        mesh: with sequence parallelism the rows are filled up to a multiple of tp.
        empty_slot: of the cache.
    """

    def __init__(self, segments: list[Segment], blocks: BlockManager, mesh: Mesh, empty_slot: int):
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        self.first_rows: list[int] = []
        """Of each segment."""
        for segment in segments:
            self.first_rows.append(len(tokens))
            tokens += segment.sequence.tokens[segment.start : segment.stop]
            positions += range(segment.start, segment.stop)
            slots += blocks.slots(segment.sequence.blocks, segment.start, segment.stop)
        self.num_rows = len(tokens)
        self.slots = torch.tensor(slots)
        num_fill = -len(tokens) % mesh.tp.num_ranks if mesh.sp else 0
        self.positions = torch.tensor(positions + [0] * num_fill)
        ids = torch.tensor(tokens + [0] * num_fill)
        samples = torch.arange(len(ids))
        self.microbatch = Microbatch(0, ids, ids, samples, 1, 0, _NoGradients(), mesh)

        decoding = [i for i, segment in enumerate(segments) if segment.stop - segment.start == 1]
        groups = [[i] for i in range(len(segments)) if i not in set(decoding)]
        self.attended = [
            self._attended([segments[i] for i in group], group, blocks, empty_slot)
            for group in [*([decoding] if decoding else []), *groups]
        ]

    def _attended(
        self, segments: list[Segment], numbers: list[int], blocks: BlockManager, empty_slot: int
    ) -> _Attended:
        longest = max(segment.stop for segment in segments)
        rows: list[int] = []
        context: list[int] = []
        queries: list[list[int]] = []
        for segment, number in zip(segments, numbers, strict=True):
            count = segment.stop - segment.start
            rows += range(self.first_rows[number], self.first_rows[number] + count)
            context += blocks.slots(segment.sequence.blocks, 0, segment.stop)
            context += [empty_slot] * (longest - segment.stop)
            queries.append(list(range(segment.start, segment.stop)))
        hidden = torch.arange(longest) > torch.tensor(queries)[..., None]
        return _Attended(torch.tensor(rows), torch.tensor(context), hidden)


def run_stage(model: Gpt, x: Tensor | None, batch: StepBatch, cache: KvCache) -> Tensor:
    """One step through this stage; its keys and values go into the cache.

    Args:
        model: the stage.
        x: [local rows, h], what the stage before returned; None on the first.
        batch: the step.
        cache: of this stage.

    Returns:
        [local rows, h] in the compute dtype.

    Contract: collective over tp. Numerics: [Note: same bits as training].
    """
    if x is None:
        embedding, local = model.embedding, batch.microbatch.local_slice
        x = look_up(embedding.word_embeddings(), batch.microbatch)
        x += embedding.position_embeddings()[batch.positions[local]]
    for index, layer in enumerate(model.layers):
        assert isinstance(layer, TransformerLayer)
        x = _run_layer(layer, x, batch, cache, index)
    return x


def _run_layer(
    layer: TransformerLayer, x: Tensor, batch: StepBatch, cache: KvCache, index: int
) -> Tensor:
    mb = batch.microbatch
    ids = mb.token_ids()
    attention = layer.self_attention
    qkv: Tensor = attention.linear_qkv(layer.input_layernorm(x, mb), mb)
    context = _attend(qkv, attention, batch, cache, index)
    x = dropout_add(attention.linear_proj(context, mb), x, 0.0, 0, ids)
    assert isinstance(layer.mlp, Mlp)
    y = layer.mlp(layer.pre_mlp_layernorm(x, mb), mb)
    return dropout_add(y, x, 0.0, 0, ids)


def _attend(
    qkv: Tensor, attention: SelfAttention, batch: StepBatch, cache: KvCache, index: int
) -> Tensor:
    """[parts, rows, heads / C * 3 * d] -> [parts, rows, heads / C * d]."""
    parts, num_rows, width = qkv.shape
    head_dim = attention.head_dim
    heads = width // (3 * head_dim)
    by_head = qkv.view(parts, num_rows, heads, 3, head_dim).permute(3, 0, 2, 1, 4)
    q, k, v = by_head.reshape(3, parts * heads, num_rows, head_dim).unbind()  # [H, rows, d]
    cache.write(index, batch.slots, k[:, : batch.num_rows], v[:, : batch.num_rows])
    alpha = 1.0 / (math.sqrt(head_dim) * attention.layer_number)
    out = torch.zeros_like(q)
    for group in batch.attended:
        requests, queries, length = group.hidden.shape
        shape = (parts * heads * requests, -1, head_dim)
        keys, values = (part.view(shape) for part in cache.read(index, group.context))
        mine = q.index_select(1, group.rows).view(shape)
        scores = kernels.gemm(mine, keys, transpose_b=True, alpha=alpha, out_dtype=q.dtype)
        scores.view(-1, requests, queries, length).masked_fill_(group.hidden, -math.inf)
        probs = kernels.softmax(scores, float(attention.layer_number))
        context = kernels.gemm(probs, values, out_dtype=q.dtype)
        out.index_copy_(1, group.rows, context.view(parts * heads, requests * queries, head_dim))
    out = out.view(parts, heads, num_rows, head_dim).transpose(1, 2)
    return out.reshape(parts, num_rows, heads * head_dim)


def head_logits(model: Gpt, x: Tensor, rows: Tensor, mb: Microbatch) -> Tensor:
    """The logits of some rows, on all tp ranks of the last stage: [C, rows, V / C], -0 made +0.

    Args:
        model: the last stage.
        x: [local rows, h], as ``run_stage`` returned it.
        rows: [n] int64.
        mb: the step's.
    """
    chosen = mb.mesh.gather_tokens(model.final_layernorm(x, mb))[rows]
    logits = kernels.gemm(chosen, model.head(), transpose_b=True, out_dtype=x.dtype)
    return mb.mesh.tp.all_gather(logits) + 0.0
