"""Token and position embedding, and the tied head with its loss."""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from primitives.arithmetic import kernels
from primitives.layout import NUM_PARTS
from scenarios.parallel.layers import Layer, column_linear
from scenarios.parallel.mesh import Stage
from scenarios.parallel.microbatch import Microbatch
from scenarios.parallel.parameters import ParameterSpec, column_spec


class _Embedding(Function):
    @staticmethod
    def forward(
        ctx: Any,
        gradient_root: Tensor,
        words: Tensor,
        positions: Tensor,
        types: Tensor | None,
        token_types: Tensor | None,
        probability: float,
        name: str,
        mb: Microbatch,
    ) -> Tensor:
        ctx.words_shape, ctx.positions_shape = words.shape, positions.shape
        ctx.types_shape = None if types is None else types.shape
        ctx.probability, ctx.name, ctx.mb = probability, name, mb
        ctx.key, ctx.token_ids = mb.dropout_key("embedding", "hidden"), mb.token_ids()
        x = look_up(words, mb)
        x += positions[_local_positions(mb)].repeat_interleave(mb.num_samples, dim=0)
        if types is not None and token_types is not None:
            ctx.token_types = token_types[mb.local_slice]
            x += types[ctx.token_types]
        return kernels.dropout(x, probability, ctx.key, ctx.token_ids)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        name, mb = ctx.name, ctx.mb
        dx = kernels.dropout(dx.contiguous(), ctx.probability, ctx.key, ctx.token_ids)
        by_position = dx.view(-1, mb.num_samples, dx.shape[-1]).transpose(0, 1).contiguous()
        dpositions = torch.zeros(ctx.positions_shape, device=dx.device)
        # + 0.0: the zeros of other ranks' positions turn -0 into +0 with sequence parallelism.
        dpositions[_local_positions(mb)] = kernels.tree_sum(by_position) + 0.0
        mb.gradients.push(f"{name}.position_embeddings.weight", mb.index, dpositions)
        if ctx.types_shape is not None:
            dtypes = _type_gradient(dx, ctx.token_types, ctx.types_shape, mb.num_token_blocks)
            mb.gradients.push(f"{name}.tokentype_embeddings.weight", mb.index, dtypes)
        dwords = _look_up_backward(mb.mesh.gather_tokens(dx), ctx.words_shape, mb)
        mb.gradients.push(f"{name}.word_embeddings.weight.lookup", mb.index, dwords)
        return None, None, None, None, None, None, None, None


_embedding: Callable[..., Tensor] = _Embedding.apply


def _local_positions(mb: Microbatch) -> slice:
    tokens = mb.local_slice
    return slice(tokens.start // mb.num_samples, tokens.stop // mb.num_samples)


def _rows_here(shape: torch.Size, mb: Microbatch) -> tuple[Tensor, Tensor]:
    """[T] each: the tokens' rows in this rank's run of a table [parts, V / C, h]; which are in it.

    A row that is elsewhere is 0.
    """
    num_rows = shape[0] * shape[1]
    rows = mb.tokens - mb.mesh.tp.rank * num_rows
    here = (rows >= 0) & (rows < num_rows)
    return rows * here, here


def look_up(words: Tensor, mb: Microbatch) -> Tensor:
    """[local tokens, h]: a sum over tp ranks, of which one is not zero."""
    rows, here = _rows_here(words.shape, mb)
    x = kernels.embedding(rows, words).masked_fill_(~here[:, None], 0.0)
    # + 0.0: as the zeros of other ranks do, turn -0 into +0 when there are none.
    return mb.mesh.sum_over_tp(x) + 0.0


def _look_up_backward(dx: Tensor, shape: torch.Size, mb: Microbatch) -> Tensor:
    """dx [T, h] -> [parts, V / C, h] fp32, this rank's rows."""
    rows, here = _rows_here(shape, mb)
    vocab_shape = (shape[0], shape[1], shape[2])
    return kernels.embedding_backward(dx[here], rows[here], vocab_shape)


def _type_gradient(dx: Tensor, types: Tensor, shape: torch.Size, num_blocks: int) -> Tensor:
    """dx [L, h], types [L] -> [blocks, types, h] fp32: a partial sum for each run of tokens."""
    runs = zip(dx.chunk(num_blocks), types.chunk(num_blocks), strict=True)
    vocab_shape = (1, shape[0], shape[1])
    return torch.cat([kernels.embedding_backward(dy, ids, vocab_shape) for dy, ids in runs])


class WordTable(Layer):
    """The tied table [parts, V / C, h]; gradients of lookup and head stay apart until the end.

    Args:
        stage: with several pipeline stages the first has the lookup and the last the head.
        head: accumulator of the head's gradient; default ``{name}.weight.head``.
    """

    def __init__(
        self,
        name: str,
        vocab_size: int,
        hidden_size: int,
        std: float,
        dtype: torch.dtype,
        stage: Stage,
        head: str | None = None,
    ):
        if vocab_size % NUM_PARTS:
            raise ValueError(f"vocab_size is {vocab_size}; expected a multiple of {NUM_PARTS}")
        weight = f"{name}.weight"
        spec = ParameterSpec(
            weight,
            (NUM_PARTS, vocab_size // NUM_PARTS, hidden_size),
            NUM_PARTS,
            (f"{weight}.lookup",) * stage.is_first + (head or f"{weight}.head",) * stage.is_last,
            init_std=std,
            tied=True,
        )
        super().__init__([spec], dtype)

    def forward(self) -> Tensor:
        """The table itself; calling fires the hook that waits for its values."""
        return cast(Tensor, self.weight)


class PositionTable(Layer):
    """Learned absolute positions [max positions, h]."""

    def __init__(
        self, name: str, num_positions: int, hidden_size: int, std: float, dtype: torch.dtype
    ):
        weight = f"{name}.weight"
        shape = (num_positions, hidden_size)
        spec = ParameterSpec(weight, shape, 1, (weight,), init_std=std, sums_tokens=True)
        super().__init__([spec], dtype)

    def forward(self) -> Tensor:
        """The table itself; calling fires the hook that waits for its values."""
        return cast(Tensor, self.weight)


class TokenTypeTable(Layer):
    """One vector per type of token, [types, h]; its gradient is a sum over tokens."""

    def __init__(self, name: str, num_types: int, hidden_size: int, std: float, dtype: torch.dtype):
        weight, shape = f"{name}.weight", (num_types, hidden_size)
        spec = ParameterSpec(weight, shape, 1, (weight,), NUM_PARTS, init_std=std, sums_tokens=True)
        super().__init__([spec], dtype)

    def forward(self) -> Tensor:
        """The table itself; calling fires the hook that waits for its values."""
        return cast(Tensor, self.weight)


class Embedding(torch.nn.Module):
    """dropout(word[token] + position[t] (+ type[token's type])): -> [local tokens, h].

    Numerics: rounded after each addition.
    """

    def __init__(
        self,
        name: str,
        vocab_size: int,
        num_positions: int,
        hidden_size: int,
        std: float,
        dropout: float,
        dtype: torch.dtype,
        stage: Stage,
        num_token_types: int = 0,
        head: str | None = None,
    ):
        super().__init__()
        self.name = name
        self.dropout = dropout
        words, positions = f"{name}.word_embeddings", f"{name}.position_embeddings"
        self.word_embeddings = WordTable(words, vocab_size, hidden_size, std, dtype, stage, head)
        self.position_embeddings = PositionTable(positions, num_positions, hidden_size, std, dtype)
        self.tokentype_embeddings: TokenTypeTable | None = None
        if num_token_types:
            types = f"{name}.tokentype_embeddings"
            self.tokentype_embeddings = TokenTypeTable(
                types, num_token_types, hidden_size, std, dtype
            )
        # The weights ask autograd for nothing, so something else must start the graph.
        self.gradient_root = torch.zeros(1, requires_grad=True)

    def forward(self, mb: Microbatch, token_types: Tensor | None = None) -> Tensor:
        """-> [local tokens, h] in the compute dtype.

        Args:
            mb: the microbatch.
            token_types: [tokens] int64, for models that have them.
        """
        words, positions = self.word_embeddings(), self.position_embeddings()
        types = None if self.tokentype_embeddings is None else self.tokentype_embeddings()
        return _embedding(
            self.gradient_root, words, positions, types, token_types, self.dropout, self.name, mb
        )


class _CrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, mb: Microbatch) -> Tensor:
        tp = mb.mesh.tp
        first = tp.rank * logits.shape[0] * logits.shape[2]
        vocab_size = NUM_PARTS * logits.shape[2]
        maximum = kernels.vocabulary_max(logits)
        tp.all_reduce(maximum, dist.ReduceOp.MAX)
        # One collective for both: the tree over ranks ends that over parts; one target is not 0.
        sums = torch.stack(
            kernels.cross_entropy_sums(logits, mb.labels, maximum, first, vocab_size)
        )
        tp.all_reduce(sums)
        sum_exp, target_logit = sums.unbind()
        ctx.save_for_backward(logits, maximum, sum_exp)
        ctx.labels, ctx.first, ctx.vocab_size = mb.labels, first, vocab_size
        return kernels.cross_entropy_loss(maximum, sum_exp, target_logit)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        logits, maximum, sum_exp = ctx.saved_tensors
        dlogits = kernels.cross_entropy_backward(
            logits, ctx.labels, maximum, sum_exp, dloss.contiguous(), ctx.first, ctx.vocab_size
        )
        return dlogits, None


_cross_entropy: Callable[..., Tensor] = _CrossEntropy.apply


class OutputBias(Layer):
    """A bias of the vocabulary, [parts, V / C]."""

    def __init__(self, name: str, vocab_size: int, dtype: torch.dtype):
        super().__init__([column_spec(f"{name}.bias", (vocab_size,), weight_decay=False)], dtype)
        self.name = name

    def forward(self) -> Tensor:
        """The bias itself; calling fires the hook that waits for its values."""
        return cast(Tensor, self.bias)


def biased_head_loss(x: Tensor, table: WordTable, bias: OutputBias, mb: Microbatch) -> Tensor:
    """As ``tied_head_loss``, with a bias added to the logits; arguments as there.

    The gradients go to the accumulators ``{bias.name}.weight``, which must be the head of the
    table, and ``{bias.name}.bias``.
    """
    logits = column_linear(x, table(), bias(), f"{bias.name}.weight", mb)
    return _cross_entropy(logits, mb)


def tied_head_loss(x: Tensor, table: WordTable, name: str, mb: Microbatch) -> Tensor:
    """Cross entropy of every token: -> [T] fp32 on all tp ranks, with the word table as the head.

    Args:
        x: [local tokens, h], compute dtype.
        table: the word table.
        name: its name; the gradient goes to the accumulator ``{name}.weight.head``.
        mb: the microbatch whose labels to use.
    """
    logits = column_linear(x, table(), None, f"{name}.weight.head", mb)
    return _cross_entropy(logits, mb)
