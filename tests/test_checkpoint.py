"""Checkpoints come back bit for bit, for any split over ranks; bad input is named."""

import json
import math
import struct
import tempfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from thread_ranks import on_ranks

from primitives.checkpoint import CheckpointManager, FSDPCheckpointManager
from primitives.checkpoint.chunks import Box, LocalState, LocalTensor, TensorKind, collect
from primitives.checkpoint.exchange import Exchange
from primitives.checkpoint.folder import CheckpointRoot
from primitives.checkpoint.plain_values import canonical_json, decode, encode
from primitives.checkpoint.reader import load_state
from primitives.checkpoint.shard_file import DTYPE_NAMES
from primitives.checkpoint.writer import save_state


def bits(value: Any) -> Any:
    """A form of a nested state in which equality means equal bits and types."""
    if isinstance(value, dict):
        return {name: bits(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value), [bits(item) for item in value]
    if isinstance(value, torch.Tensor):
        data = value.reshape(-1).view(torch.uint8).tolist() if value.numel() else []
        return value.dtype, tuple(value.shape), data
    if isinstance(value, float):
        return float, struct.pack(">d", value)
    return type(value), value


any_float = st.integers(0, 2**64 - 1).map(lambda n: struct.unpack(">d", n.to_bytes(8, "big"))[0])
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | any_float
    | st.text(max_size=5)
    | st.binary(max_size=5)
)
plain = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Tensors of any storable dtype, up to three dimensions, with any bit pattern."""
    dtype = draw(st.sampled_from(list(DTYPE_NAMES)))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    element = torch.empty((), dtype=dtype).element_size()
    limit = 1 if dtype is torch.bool else 255
    nbytes = math.prod(shape) * element
    raw = draw(st.lists(st.integers(0, limit), min_size=nbytes, max_size=nbytes))
    tensor = torch.tensor(raw, dtype=torch.uint8).view(dtype).reshape(shape)
    return tensor.t() if tensor.dim() == 2 and draw(st.booleans()) else tensor


names = st.text(alphabet="ab/~[0].é", max_size=4)
# A dict is a level of the state; plain dicts inside lists are values.
states = st.dictionaries(
    names,
    st.recursive(
        tensors() | plain.filter(lambda value: not isinstance(value, dict)),
        lambda inner: st.dictionaries(names, inner, min_size=1, max_size=3),
        max_leaves=6,
    ),
    max_size=4,
)


def blank(state: dict[str, Any]) -> dict[str, Any]:
    """A state of the same structure that holds nothing of the contents."""
    result: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, dict):
            result[name] = blank(value)
        elif isinstance(value, torch.Tensor):
            result[name] = torch.zeros(value.shape, dtype=value.dtype)
        else:
            result[name] = "to be replaced"
    return result


def save_on(
    world_size: int, root: Path, step: int, make_local: Callable[[int], LocalState]
) -> list[Any]:
    def body(exchange: Exchange) -> None:
        local = lambda: make_local(exchange.rank)  # noqa: E731
        save_state(CheckpointRoot(root), step, local, exchange, None)

    return on_ranks(world_size, body)


def test_values_of_schedules_and_loaders_come_back() -> None:
    value = [
        {1: "a", (2, "b"): None},
        Counter({3: 4}),
        OrderedDict([("z", 1), ("a", 2)]),
        torch.tensor([1.0, -0.0, math.nan], dtype=torch.bfloat16),
        torch.empty(0, 3, dtype=torch.int64),
        torch.tensor(True),
        np.arange(6, dtype=np.int16).reshape(2, 3),
        np.float32(1.5),
        np.int64(-1),
    ]
    got = decode(json.loads(canonical_json(encode(value, "k"))))
    assert [type(item) for item in got] == [type(item) for item in value]
    assert got[:3] == value[:3]
    assert list(got[2]) == ["z", "a"]
    assert bits(got[3:6]) == bits(value[3:6])
    for actual, expected in zip(got[6:], value[6:], strict=True):
        assert actual.dtype == expected.dtype
        assert actual.tobytes() == expected.tobytes()
        assert actual.shape == expected.shape


@given(plain)
def test_plain_values_come_back(value: Any) -> None:
    assert bits(decode(json.loads(canonical_json(encode(value, "k"))))) == bits(value)


@pytest.mark.parametrize(
    "value", [object(), {1, 2}, 1j, {1: {3}}, [torch.zeros(1) * 1j], Path("a")]
)
def test_other_values_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="checkpoint key 'model/x': cannot store"):
        encode(value, "model/x")


@settings(deadline=None, max_examples=60)
@given(states, st.integers(1, 4), st.integers(1, 3), st.data())
def test_any_split_over_ranks_comes_back(
    state: dict[str, Any], num_writers: int, num_readers: int, data: st.DataObject
) -> None:
    """Each entry is held by some ranks; other ranks, and more or fewer of them, ask for all."""
    flat = collect(state)
    keys = sorted([*flat.tensors, *flat.values])
    holders = {key: data.draw(st.sets(st.integers(0, num_writers - 1), min_size=1)) for key in keys}

    def part(rank: int) -> LocalState:
        mine = {key for key in keys if rank in holders[key]}
        return LocalState(
            {key: tensor for key, tensor in flat.tensors.items() if key in mine},
            {key: value for key, value in flat.values.items() if key in mine},
        )

    with tempfile.TemporaryDirectory() as folder:
        assert save_on(num_writers, Path(folder), 7, part) == [None] * num_writers

        def read(exchange: Exchange) -> Any:
            target = blank(state)
            assert load_state(CheckpointRoot(Path(folder)), target, None, exchange) == 7
            return bits(target)

        assert on_ranks(num_readers, read) == [bits(state)] * num_readers


def boxes_of(full: torch.Tensor, cuts: list[list[int]]) -> list[tuple[Box, torch.Tensor]]:
    """``full`` cut along every dimension."""
    boxes = [Box((0,) * full.dim(), tuple(full.shape))]
    for dim, positions in enumerate(cuts):
        edges = [0, *sorted(positions), full.shape[dim]]
        boxes = [
            Box(
                (*box.offset[:dim], start, *box.offset[dim + 1 :]),
                (*box.shape[:dim], end - start, *box.shape[dim + 1 :]),
            )
            for box in boxes
            for start, end in pairwise(edges)
            if end > start
        ]
    whole = Box((0,) * full.dim(), tuple(full.shape))
    return [(box, full[box.slices_within(whole)]) for box in boxes]


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_shards_are_put_together(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    full = torch.arange(math.prod(shape), dtype=torch.int32).reshape(shape)
    cuts = [data.draw(st.lists(st.integers(0, n), max_size=2)) for n in shape]
    pieces = boxes_of(full, cuts)
    owner = [data.draw(st.sets(st.integers(0, 2), min_size=1)) for _ in pieces]
    kind = TensorKind("I32", tuple(shape))

    def part(rank: int) -> LocalState:
        mine = {box: x for (box, x), ranks in zip(pieces, owner, strict=True) if rank in ranks}
        return LocalState({"w": LocalTensor(kind, mine)})

    with tempfile.TemporaryDirectory() as folder:
        assert save_on(3, Path(folder), 1, part) == [None] * 3
        target = {"w": torch.full(shape, -1, dtype=torch.int32)}
        CheckpointManager(Path(folder)).load(target)
        assert torch.equal(target["w"], full)


def test_files_are_plain_safetensors(tmp_path: Path) -> None:
    state = {"a": {"w": torch.arange(6.0).reshape(2, 3)}, "b": torch.tensor([True, False])}
    CheckpointManager(tmp_path).save(1, state)
    loaded = load_file(tmp_path / "iter_0000001" / "shard_00000.safetensors")
    assert bits(loaded) == bits({"a/w": state["a"]["w"], "b": state["b"]})


def test_names_inside_a_file_are_unique(tmp_path: Path) -> None:
    kind = TensorKind("F32", (4,))
    halves = {LOW: torch.zeros(2), HIGH: torch.ones(2)}
    local = collect({"w[0]": torch.full((3,), 2.0), "__metadata__": torch.ones(1)})
    local.tensors["w"] = LocalTensor(kind, halves)
    assert save_on(1, tmp_path, 1, lambda _: local) == [None]
    target = {"w": torch.empty(4), "w[0]": torch.empty(3), "__metadata__": torch.empty(1)}
    CheckpointManager(tmp_path).load(target)
    assert [t.tolist() for t in target.values()] == [[0, 0, 1, 1], [2, 2, 2], [1]]


def test_equal_state_gives_equal_files(tmp_path: Path) -> None:
    state = {"w": torch.arange(6.0), "h": torch.ones(3, dtype=torch.float16), "x": [1.5]}
    for name in ("one", "two"):
        CheckpointManager(tmp_path / name).save(1, state)
    for path in sorted((tmp_path / "one" / "iter_0000001").iterdir()):
        assert path.read_bytes() == (tmp_path / "two" / "iter_0000001" / path.name).read_bytes()


def test_one_file_per_writing_rank_and_no_copy_twice(tmp_path: Path) -> None:
    tensor = torch.arange(1000.0)
    save_on(4, tmp_path, 1, lambda _: collect({"a": tensor, "b": tensor + 1}))
    sizes = [path.stat().st_size for path in tmp_path.glob("iter_*/shard_*")]
    assert len(sizes) == 2
    assert sum(sizes) < 2 * tensor.nbytes + 1000


KIND = TensorKind("F32", (4,))
LOW, HIGH = Box((0,), (2,)), Box((2,), (2,))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([{"x": torch.zeros(2)}, {"x": torch.ones(2)}], "'x': the tensor on rank 1 differs"),
        ([{"x": torch.zeros(2)}, {"x": torch.tensor([0.0, -0.0])}], "tensor on rank 1 differs"),
        ([{"x": torch.zeros(2)}, {"x": torch.zeros(3)}], r"F32 \[3\] on rank 1, F32 \[2\]"),
        ([{"x": torch.zeros(2)}, {"x": torch.zeros(2).half()}], r"F16 \[2\] on rank 1"),
        ([{"x": torch.zeros(2)}, {"x": 1}], "'x': a tensor on one rank, a value on another"),
        ([{"x": 1}, {"x": 2}], "'x': 2 on rank 1, 1 on a lower rank"),
        ([{"x": 1}, {"x": True}], "'x': True on rank 1"),
        ([{"x": 0.0}, {"x": -0.0}], "'x': -0.0 on rank 1"),
        ([{}, {"x": {"y": {1: 2}}}], r"rank 1: checkpoint state under 'x/y/': key 1 is not"),
        ([{"x": torch.zeros(2, dtype=torch.complex64)}, {}], "rank 0: .*cannot store torch.compl"),
        ([LocalState({"x": LocalTensor(KIND, {LOW: torch.zeros(2)})}), {}], "hold 2 different"),
        (
            [
                LocalState({"x": LocalTensor(KIND, {LOW: torch.zeros(2)})}),
                LocalState({"x": LocalTensor(KIND, {Box((0,), (4,)): torch.zeros(4)})}),
            ],
            "hold 6 different elements",
        ),
    ],
)
def test_contradictions_are_refused_on_every_rank(
    parts: list[Any], message: str, tmp_path: Path
) -> None:
    def part(rank: int) -> LocalState:
        own = parts[rank]
        return own if isinstance(own, LocalState) else collect(own)

    for error in save_on(2, tmp_path, 1, part):
        with pytest.raises(ValueError, match=message):
            raise error
    assert CheckpointManager(tmp_path).steps() == []
    assert not list(tmp_path.glob(".iter*"))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"none": torch.zeros(2)}, "no key 'none'"),
        ({"w": 1}, "key 'w' is a tensor, expected a plain value"),
        ({"lr": torch.zeros(())}, "key 'lr' is a plain value, expected a tensor"),
        ({"w": torch.zeros(3)}, r"key 'w' is F32 \[2\], expected F32 \[3\]"),
        ({"w": torch.zeros(2).double()}, r"key 'w' is F32 \[2\], expected F64 \[2\]"),
    ],
)
def test_load_refuses_what_does_not_fit(
    target: dict[str, Any], message: str, tmp_path: Path
) -> None:
    manager = CheckpointManager(tmp_path)
    manager.save(1, {"w": torch.ones(2), "ok": torch.ones(2), "lr": 0.5})
    state = {"ok": torch.zeros(2), **target}
    before = bits(state)
    with pytest.raises(ValueError, match=message):
        manager.load(state)
    assert bits(state) == before


def test_which_checkpoint(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path / "not" / "yet" / "there")
    assert manager.latest() is None
    assert manager.steps() == []
    with pytest.raises(FileNotFoundError, match="no checkpoint; have steps"):
        manager.load({})
    for step in (20, 5, 10):  # the one saved last, not the one with the highest number
        manager.save(step, {"step": step})
    assert manager.steps() == [5, 10, 20]
    assert manager.latest() == 10
    assert (tmp_path / "not/yet/there/latest").read_text() == "10\n"
    state = {"step": None}
    assert manager.load(state, 5) == 5
    assert state == {"step": 5}
    with pytest.raises(FileNotFoundError, match="of step 7; have steps"):
        manager.load({}, 7)
    with pytest.raises(ValueError, match="no checkpoint of step 7"):
        manager.delete(7)
    manager.delete(10)
    assert manager.latest() == 5
    assert manager.contents(5).names() == {"step"}


def test_keep(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep: got 0"):
        CheckpointManager(tmp_path, keep=0)
    for step in (1, 2, 3, 4):  # each time another process
        CheckpointManager(tmp_path, keep=2).save(step, {"x": step})
    assert CheckpointManager(tmp_path).steps() == [3, 4]


@pytest.mark.parametrize("step", [-1, 1.0, True, "1"])
def test_bad_step(step: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="step: got"):
        CheckpointManager(tmp_path).save(step, {})


def test_a_subgroup_saves_and_loads_but_not_in_the_background(tmp_path: Path) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        manager = CheckpointManager(tmp_path, process_group=dist.new_group([0]))
        manager.save(1, {"x": torch.ones(3)})
        with pytest.raises(ValueError, match="got True on a sub-group"):
            manager.save(2, {"x": torch.ones(3)}, asynchronous=True)
        model = torch.nn.Linear(2, 2)
        with pytest.raises(ValueError, match="got True on a sub-group"):
            FSDPCheckpointManager(
                tmp_path, model, asynchronous=True, process_group=dist.new_group([0])
            )
        state = {"x": torch.zeros(3)}
        assert manager.load(state) == 1
        assert state["x"].tolist() == [1.0, 1.0, 1.0]
        manager = CheckpointManager(tmp_path, process_group=dist.group.WORLD)
        manager.save(3, state, asynchronous=True)
        manager.wait()
        assert manager.steps() == [1, 3]
    finally:
        dist.destroy_process_group()


def test_the_latest_file_follows_a_deletion(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    for step in (1, 3, 2):
        manager.save(step, {"x": step})
    manager.delete(2)
    assert (tmp_path / "latest").read_text() == "3\n"
    manager.delete(1)
    assert (tmp_path / "latest").read_text() == "3\n"
    manager.delete(3)
    assert not (tmp_path / "latest").exists()
