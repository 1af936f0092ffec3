"""What one process does with a batch alone: cuts, orders, joins, names, files."""

import tempfile
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from tensordict import TensorDict

from primitives.sharded_tensordict import ShardedTensorDict
from primitives.sharded_tensordict.batch import PADDING
from special_distributed.batches import Plan, batch_of, contents, plans

examples = settings(max_examples=30, deadline=None)
rows = st.integers(0, 9)


@examples
@given(plans, rows, st.integers(1, 5), st.integers(1, 5))
def test_cuts_are_joined_again(plan: Plan, num_rows: int, num_chunks: int, size: int) -> None:
    batch = batch_of(plan, num_rows, 1)
    chunks = batch.chunk(num_chunks)
    sizes = [len(chunk) for chunk in chunks]
    assert len(chunks) == num_chunks
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)
    assert contents(ShardedTensorDict.concat(chunks)) == contents(batch)
    if parts := batch.split(size):
        assert [len(part) for part in parts[:-1]] == [size] * (len(parts) - 1)
        assert contents(ShardedTensorDict.concat(parts)) == contents(batch)
    assert [row for part in batch.iterate(size) for row in contents(part)] == contents(batch)


@examples
@given(plans, rows, st.integers(1, 6), st.integers(1, 6), st.randoms())
def test_unpad_undoes_pad(plan: Plan, num_rows: int, first: int, second: int, draw: Any) -> None:
    batch = batch_of(plan, num_rows, 1)
    padded = batch.pad_to_divisor(first)
    assert len(padded) % first == 0
    assert len(padded) - num_rows < first
    assert contents(padded.unpad()) == contents(batch)
    twice = padded.pad_to_divisor(second)
    order = list(range(len(twice)))
    draw.shuffle(order)
    shuffled = twice.reorder(order).unpad()
    assert sorted(map(repr, contents(shuffled))) == sorted(map(repr, contents(batch)))
    assert PADDING not in batch.leaves()


@examples
@given(plans, rows, st.data())
def test_rows_are_the_rows_asked_for(plan: Plan, num_rows: int, data: st.DataObject) -> None:
    batch = batch_of(plan, num_rows, 1)
    expected = contents(batch)
    if num_rows:
        index = data.draw(st.lists(st.integers(-num_rows, num_rows - 1), max_size=5))
        assert contents(batch[index]) == [expected[row] for row in index]
    chosen = data.draw(st.slices(num_rows))
    assert contents(batch[chosen]) == expected[chosen]
    mask = data.draw(st.lists(st.booleans(), min_size=num_rows, max_size=num_rows))
    kept = [row for row, keep in zip(expected, mask, strict=True) if keep]
    assert contents(batch[torch.tensor(mask, dtype=torch.bool)]) == kept
    times = data.draw(st.integers(0, 3))
    assert contents(batch.repeat(times)) == [row for row in expected for _ in range(times)]
    assert contents(batch.repeat(times, interleave=False)) == expected * times
    each = data.draw(st.lists(st.integers(0, 2), min_size=num_rows, max_size=num_rows))
    often = [row for row, n in zip(expected, each, strict=True) for _ in range(n)]
    assert contents(batch.repeat(each)) == often
    order = data.draw(st.permutations(range(num_rows)))
    assert contents(batch.reorder(order)) == [expected[row] for row in order]
    assert contents(batch.reorder(order).reorder(np.argsort(order))) == expected
    shuffled = [r for part in batch.iterate(2, epochs=2, seed=3) for r in contents(part)]
    assert sorted(map(repr, shuffled)) == sorted(map(repr, expected * 2))


@examples
@given(plans, rows)
def test_names(plan: Plan, num_rows: int) -> None:
    batch = batch_of(plan, num_rows, 1)
    keys = list(batch.leaves())
    popped, rest = batch.pop(keys[:1], ["text"], ["temperature"])
    assert list(popped.leaves()) == keys[:1]
    assert list(rest.columns) == ["lists"]
    assert list(rest.meta) == ["missing"]
    together = rest.union(popped)
    assert together.leaves().keys() == batch.leaves().keys()
    assert contents(together) == contents(batch)
    assert together.meta.keys() == batch.meta.keys()
    assert contents(batch.union(batch)) == contents(batch)  # NaN equals NaN
    renamed = batch.rename({key: f"new {number}" for number, key in enumerate([*keys, "text"])})
    assert len(renamed.leaves()) == len(keys)
    back = renamed.rename({f"new {number}": key for number, key in enumerate([*keys, "text"])})
    assert contents(back) == contents(batch)


@examples
@given(plans, rows)
def test_files(plan: Plan, num_rows: int) -> None:
    batch = batch_of(plan, num_rows, 1)
    with tempfile.TemporaryDirectory() as place:
        batch.save(Path(place, "batch.safetensors"))
        batch.memmap(Path(place, "mapped"))
        for loaded in (
            ShardedTensorDict.load(Path(place, "batch.safetensors")),
            ShardedTensorDict.load_memmap(Path(place, "mapped")),
        ):
            assert contents(loaded) == contents(batch)
            assert loaded.leaves().keys() == batch.leaves().keys()
            assert repr(loaded.meta) == repr(batch.meta)
        with pytest.raises(ValueError, match="is not empty"):
            batch.memmap(Path(place, "mapped"))
        with pytest.raises(ValueError, match="not a batch"):
            ShardedTensorDict.load_memmap(Path(place))


def test_from_dict_sorts_tensors_from_columns() -> None:
    values = {
        "x": torch.ones(2),
        "y": np.arange(2),
        "z": ["a", {}],
        "o": np.array([1, "b"], object),
    }
    batch = ShardedTensorDict.from_dict(values, {"k": 1})
    assert set(batch.leaves()) == {"x", "y"}
    assert set(batch.columns) == {"z", "o"}
    assert batch.row(1)["o"] == "b"
    assert batch.row(-1)["y"] == 1
    assert len(ShardedTensorDict.from_dict({})) == 0


def test_mistakes_are_named() -> None:
    batch = ShardedTensorDict.from_dict({"x": torch.arange(3), "s": ["a", "b", "c"]}, {"m": 1})
    other = ShardedTensorDict.from_dict({"x": torch.tensor([0, 1, 5])}, {"m": 1})
    for call, message in (
        (lambda: batch[torch.ones(2)], r"got torch.float32 \[2\]"),
        (lambda: batch[torch.tensor([True])], "a mask of 1 for 3 rows"),
        (lambda: batch[[3]], r"\[3\] goes beyond the 3 rows"),
        (lambda: batch.row(3), "row: got 3"),
        (lambda: batch.select(["y"]), "tensors: no y; have x"),
        (lambda: batch.pop(columns=["t"]), "columns: no t; have s"),
        (lambda: batch.rename({"x": "s"}), "would clash"),
        (lambda: batch.rename({"q": "s"}), "rename: no q"),
        (lambda: batch.union(other), "union of tensor x: the two batches have different"),
        (lambda: batch.union(batch.chunk(2)[0]), "union: 3 rows and 2 rows"),
        (
            lambda: batch.union(ShardedTensorDict.from_dict({"s": ["a", "b", "d"]})),
            "union of column 's': row 2 differs",
        ),
        (
            lambda: batch.union(ShardedTensorDict.from_dict({"y": torch.ones(3)}, {"m": 2})),
            "meta m: batch 1 has 2, batch 0 has 1",
        ),
        (lambda: batch.split(0), "split: got 0"),
        (lambda: batch.chunk(0), "got 0, expected at least 1"),
        (lambda: batch.pad_to_divisor(0), "pad_to_divisor: got 0"),
        (lambda: batch.unpad(), "unpad: no padding"),
        (lambda: batch.reorder([0, 0, 1]), r"reorder: got \[0, 0, 1\]"),
        (lambda: batch.repeat([1, 2]), r"repeat: got \[1, 2\], expected a number or 3"),
        (lambda: batch.repeat(-1), "repeat: got -1"),
        (lambda: batch.repeat(1.5), "repeat: got 1.5"),
        (lambda: ShardedTensorDict.concat([]), "concat: got no batch"),
        (lambda: ShardedTensorDict.concat([batch, other]), "lacks s"),
        (lambda: batch.all_gather(), "on no mesh"),
        (lambda: batch.to_dtensor("x"), "on no mesh"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_meta_policies() -> None:
    one = ShardedTensorDict(TensorDict({}, batch_size=[1]), {}, {"a": 1, "b": float("nan")})
    two = ShardedTensorDict(TensorDict({}, batch_size=[1]), {}, {"a": 2, "b": float("nan")})
    concat = ShardedTensorDict.concat
    assert repr(concat([one, one]).meta) == repr(one.meta)
    assert concat([one, two], meta="first").meta["a"] == 1
    assert concat([one, two], meta="gather").meta["a"] == [1, 2]
    assert concat([one, two], meta=lambda metas: {"sum": sum(m["a"] for m in metas)}).meta == {
        "sum": 3
    }
    with pytest.raises(ValueError, match="got 'best', expected equal, first, gather"):
        concat([one, two], meta="best")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_only_jagged_nested_tensors() -> None:
    strided = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    with pytest.raises(ValueError, match=r"x is nested with layout torch.strided"):
        ShardedTensorDict(TensorDict({"x": strided}, batch_size=[2]))
