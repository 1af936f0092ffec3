"""Token and position embedding, and the tied head with its loss."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function

from primitives import canonical
from primitives.layout import NUM_PARTS
from scenarios.parallel.layers import Layer, column_linear
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
        num_samples = mb.num_samples
        ctx.words_shape, ctx.positions_shape = words.shape, positions.shape
        ctx.token_types, ctx.types_shape = token_types, None if types is None else types.shape
        ctx.probability, ctx.name, ctx.mb = probability, name, mb
        ctx.key, ctx.token_ids = mb.dropout_key("embedding", "hidden"), mb.token_ids()
        x = canonical.embedding(mb.tokens, words)
        x += positions[: mb.seq_length].repeat_interleave(num_samples, dim=0)
        if types is not None:
            x += types[token_types]
        return canonical.dropout(x, probability, ctx.key, ctx.token_ids)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        name, mb = ctx.name, ctx.mb
        dx = canonical.dropout(dx.contiguous(), ctx.probability, ctx.key, ctx.token_ids)
        by_position = dx.view(mb.seq_length, mb.num_samples, -1).transpose(0, 1).contiguous()
        dpositions = torch.zeros(ctx.positions_shape)
        dpositions[: mb.seq_length] = canonical.tree_sum(by_position)
        mb.gradients.push(f"{name}.position_embeddings.weight", mb.index, dpositions)
        if ctx.types_shape is not None:
            dtypes = _token_type_gradient(dx, ctx.token_types, ctx.types_shape)
            mb.gradients.push(f"{name}.tokentype_embeddings.weight", mb.index, dtypes)
        dwords = canonical.embedding_backward(dx, mb.tokens, ctx.words_shape)
        mb.gradients.push(f"{name}.word_embeddings.weight.lookup", mb.index, dwords)
        return None, None, None, None, None, None, None, None


def _token_type_gradient(dx: Tensor, types: Tensor, shape: tuple[int, int]) -> Tensor:
    """[C, types, h] fp32: a partial sum for each run of tokens."""
    runs = zip(dx.chunk(NUM_PARTS), types.chunk(NUM_PARTS), strict=True)
    return torch.cat([canonical.embedding_backward(d, ids, (1, *shape)) for d, ids in runs])


_embedding: Callable[..., Tensor] = _Embedding.apply


class WordTable(Layer):
    """The tied table [C, V / C, h]; gradients of lookup and head stay apart until the end."""

    def __init__(
        self, name: str, vocab_size: int, hidden_size: int, std: float, dtype: torch.dtype
    ):
        if vocab_size % NUM_PARTS:
            raise ValueError(f"vocab_size is {vocab_size}; expected a multiple of {NUM_PARTS}")
        weight = f"{name}.weight"
        spec = ParameterSpec(
            weight,
            (NUM_PARTS, vocab_size // NUM_PARTS, hidden_size),
            NUM_PARTS,
            (f"{weight}.lookup", f"{weight}.head"),
            init_std=std,
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
        spec = ParameterSpec(weight, (num_positions, hidden_size), 1, (weight,), init_std=std)
        super().__init__([spec], dtype)

    def forward(self) -> Tensor:
        """The table itself; calling fires the hook that waits for its values."""
        return cast(Tensor, self.weight)


class TokenTypeTable(Layer):
    """One vector per type of token, [types, h]; the gradient is a sum over tokens."""

    def __init__(self, name: str, num_types: int, hidden_size: int, std: float, dtype: torch.dtype):
        weight, shape = f"{name}.weight", (num_types, hidden_size)
        super().__init__([ParameterSpec(weight, shape, 1, (weight,), NUM_PARTS, std)], dtype)

    def forward(self) -> Tensor:
        """The table itself; calling fires the hook that waits for its values."""
        return cast(Tensor, self.weight)


class Embedding(torch.nn.Module):
    """dropout(word[token] + position[t] (+ type[token's type])): -> [T, h].

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
        num_token_types: int = 0,
    ):
        super().__init__()
        self.name = name
        self.dropout = dropout
        words, positions = f"{name}.word_embeddings", f"{name}.position_embeddings"
        self.word_embeddings = WordTable(words, vocab_size, hidden_size, std, dtype)
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
        """-> [T, h] in the compute dtype; ``token_types`` [T] int64 for models that have them."""
        words, positions = self.word_embeddings(), self.position_embeddings()
        types = None if self.tokentype_embeddings is None else self.tokentype_embeddings()
        return _embedding(
            self.gradient_root, words, positions, types, token_types, self.dropout, self.name, mb
        )


class _CrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        loss, maximum, sum_exp = canonical.cross_entropy(logits, targets)
        ctx.save_for_backward(logits, targets, maximum, sum_exp)
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, maximum, sum_exp = ctx.saved_tensors
        dlogits = canonical.cross_entropy_backward(
            logits, targets, maximum, sum_exp, dloss.contiguous()
        )
        return dlogits, None


_cross_entropy: Callable[..., Tensor] = _CrossEntropy.apply


class OutputBias(Layer):
    """A bias of the vocabulary, [C, V / C]; its gradient goes to the accumulator of its name."""

    def __init__(self, name: str, vocab_size: int, dtype: torch.dtype):
        super().__init__([column_spec(f"{name}.bias", (vocab_size,), weight_decay=False)], dtype)
        self.gradient = f"{name}.bias"

    def forward(self) -> Tensor:
        """The bias itself; calling fires the hook that waits for its values."""
        return cast(Tensor, self.bias)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The loss of each row, [T] fp32, of logits [parts, T, classes / parts]; targets [T] int64."""
    return _cross_entropy(logits, targets)


def tied_head_loss(
    x: Tensor, table: WordTable, name: str, mb: Microbatch, bias: OutputBias | None = None
) -> Tensor:
    """Cross entropy of every token: [T, h] -> [T] fp32, with the word table as the head.

    Args:
        x: [T, h], compute dtype.
        table: the word table.
        name: its name; the gradient goes to the accumulator ``{name}.weight.head``.
        mb: the microbatch whose labels to use.
        bias: added to the logits.
    """
    values, bias_gradient = (None, None) if bias is None else (bias(), bias.gradient)
    logits = column_linear(x, table(), values, f"{name}.weight.head", bias_gradient, mb)
    return _cross_entropy(logits, mb.labels)
