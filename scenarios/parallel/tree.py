"""Sums keyed by position: the adjacent-pair tree, whatever order the leaves arrive in."""

from torch import Tensor


class TreeAccumulator:
    """Adds the leaves of one aligned subtree of an adjacent-pair tree, in any arrival order.

    A binary counter: leaves that arrive in order never hold more than log2(n) + 1 partial sums.

    Args:
        total_leaves: leaves of the whole tree; its odd tail is carried up unchanged.
        first_leaf: the first leaf this accumulator receives.
        num_leaves: how many it receives. Less than the total only as an aligned power of two.

    Raises:
        ValueError: the run of leaves is not a subtree.

    Numerics: fp32 adds of exactly the pairs of ``primitives.canonical.tree_sum``.
    """

    def __init__(self, total_leaves: int, first_leaf: int = 0, num_leaves: int | None = None):
        num_leaves = total_leaves if num_leaves is None else num_leaves
        if num_leaves < 1 or not 0 <= first_leaf <= total_leaves - num_leaves:
            raise ValueError(
                f"leaves {first_leaf} to {first_leaf + num_leaves} are outside a tree of "
                f"{total_leaves}"
            )
        whole = num_leaves == total_leaves
        if not whole and (num_leaves & (num_leaves - 1) or first_leaf % num_leaves):
            raise ValueError(
                f"leaves {first_leaf} to {first_leaf + num_leaves} of {total_leaves} are no "
                "subtree; expected an aligned run whose length is a power of two"
            )
        self._total = total_leaves
        self._leaves = range(first_leaf, first_leaf + num_leaves)
        self._root_level = (num_leaves - 1).bit_length()
        self._seen: set[int] = set()
        self._nodes: dict[tuple[int, int], Tensor] = {}

    @property
    def complete(self) -> bool:
        """Whether every leaf has arrived."""
        return len(self._seen) == len(self._leaves)

    @property
    def num_partials(self) -> int:
        """How many partial sums are held now."""
        return len(self._nodes)

    def add(self, leaf: int, value: Tensor) -> None:
        """Takes ownership of ``value`` (it may be summed in place) as the given leaf."""
        if leaf not in self._leaves:
            raise ValueError(f"leaf {leaf} is not in {self._leaves}")
        if leaf in self._seen:
            raise ValueError(f"leaf {leaf} was added twice")
        self._seen.add(leaf)
        node = leaf
        for level in range(self._root_level):
            width = (self._total + (1 << level) - 1) >> level
            if node ^ 1 < width:
                sibling = self._nodes.pop((level, node ^ 1), None)
                if sibling is None:
                    self._nodes[level, node] = value
                    return
                # IEEE addition is commutative, so either one may be the accumulator.
                value = sibling.add_(value)
            node >>= 1
        self._nodes[self._root_level, node] = value

    def take(self) -> Tensor:
        """The sum; the accumulator is empty afterwards and can be used for the next step.

        Raises:
            ValueError: leaves are missing.
        """
        if not self.complete:
            missing = sorted(set(self._leaves) - self._seen)
            raise ValueError(f"leaves {missing} have not arrived")
        (root,) = self._nodes.values()
        self._nodes.clear()
        self._seen.clear()
        return root
