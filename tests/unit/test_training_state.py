"""The state beside a checkpoint's weights comes back bit for bit, or is refused with the name of the file."""

import json
import math
import os
import random
import shutil
import struct
import time
import zlib
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments, get_scheduler

from finetune.errors import RunError
from finetune.methods.training_state import (
    MAX_JSON_BYTES,
    STATE_FILES,
    TENSORS_FILE,
    TREE_FILE,
    read_state,
    rng_state,
    set_rng_state,
    snapshot,
    write_state,
)
from finetune.recipe.settings import Scheduler
from finetune.recipe.trainer_args import OPTIMIZERS, REFUSED_OPTIMIZERS

NOT_INSTALLED = {"adamw_anyprecision", "adamw_torch_4bit", "adamw_torch_8bit", "grokadamw", "stable_adamw"}
"""Optimizers whose packages are no dependencies of this one."""
ADMITTED = sorted(set(OPTIMIZERS) - set(REFUSED_OPTIMIZERS) - NOT_INSTALLED)


def same(value: Any, other: Any) -> bool:
    """The same classes and the same bits, all the way down."""
    if type(value) is not type(other):
        return False
    if isinstance(value, torch.Tensor):
        as_bytes = [part.contiguous().reshape(-1).view(torch.uint8) for part in (value, other)]
        return value.dtype == other.dtype and value.shape == other.shape and torch.equal(*as_bytes)
    if isinstance(value, (np.ndarray, np.generic)):
        return (value.dtype, value.shape, value.tobytes()) == (other.dtype, other.shape, other.tobytes())
    if isinstance(value, dict):
        return list(value) == list(other) and all(same(part, other[key]) for key, part in value.items())
    if isinstance(value, (list, tuple)):
        return len(value) == len(other) and all(map(same, value, other))
    return struct.pack(">d", value) == struct.pack(">d", other) if isinstance(value, float) else bool(value == other)


def there_and_back(folder: Path, tree: dict[str, Any]) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    write_state(folder, snapshot(tree))
    return read_state(folder)


def small_model() -> torch.nn.Module:
    """Wide enough for bitsandbytes to keep 8-bit states: it does not below 4,096 values."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(96, 96), torch.nn.Linear(96, 4))


def take_steps(
    model: torch.nn.Module, optimizer: Any, steps: int, *, scaler: Any = None, scheduler: Any = None
) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(torch.randn(8, 96)) ** 2).mean()
        (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        if scheduler is not None:
            scheduler.step(*([loss.item()] if getattr(scheduler, "best", None) is not None else []))


@pytest.mark.parametrize("name", ADMITTED)
@pytest.mark.filterwarnings("ignore:.*paged")
def test_every_optimizer_of_the_recipe_takes_the_steps_of_one_that_went_on(name: str, tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), optim=name, learning_rate=1e-2, use_cpu=True)
    model, fresh = small_model(), small_model()
    make, settings = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    optimizer, loaded = make(model.parameters(), **settings), make(fresh.parameters(), **settings)
    take_steps(model, optimizer, 3)
    fresh.load_state_dict({key: tensor.clone() for key, tensor in model.state_dict().items()})
    tree = {"optimizer": optimizer.state_dict(), "rng": rng_state()}
    back = there_and_back(tmp_path, tree)
    assert same(tree, back)
    loaded.load_state_dict(back["optimizer"])
    take_steps(model, optimizer, 3)
    set_rng_state(back["rng"])
    take_steps(fresh, loaded, 3)
    for parameter, other in zip(model.parameters(), fresh.parameters(), strict=True):
        assert same(parameter, other)
    assert same(snapshot(optimizer.state_dict()), snapshot(loaded.state_dict()))


SETTINGS: dict[str, dict[str, Any]] = {
    "cosine_with_min_lr": {"min_lr": 1e-4},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-4},
    "warmup_stable_decay": {"num_decay_steps": 3},
    "greedy": {"smooth": True},
}
"""What schedulers need, and what gives them more state."""


@pytest.mark.parametrize("name", get_args(Scheduler))
def test_every_scheduler_of_the_recipe_goes_on(name: str, tmp_path: Path) -> None:
    settings = SETTINGS.get(name, {})
    runs = []
    for _ in range(2):
        optimizer = torch.optim.SGD(small_model().parameters(), lr=0.1)
        runs.append((optimizer, get_scheduler(name, optimizer, 0, 8, scheduler_specific_kwargs=settings)))

    def rates(run: int, losses: list[float]) -> list[float]:
        optimizer, scheduler = runs[run]
        found = []
        for loss in losses:
            optimizer.step()
            scheduler.step(*([loss] if name in ("reduce_lr_on_plateau", "greedy") else []))
            found.append(optimizer.param_groups[0]["lr"])
        return found

    rates(0, [1.0, 2.0, 3.0])
    tree = {"scheduler": runs[0][1].state_dict(), "optimizer": runs[0][0].state_dict()}
    back = there_and_back(tmp_path, tree)
    assert same(snapshot(tree), back)
    runs[1][1].load_state_dict(back["scheduler"])
    runs[1][0].load_state_dict(back["optimizer"])
    assert rates(0, [1.0, 2.0, 3.0, 4.0]) == rates(1, [1.0, 2.0, 3.0, 4.0])


def test_a_gradient_scaler_goes_on(tmp_path: Path) -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scalers = [torch.amp.GradScaler("cpu", growth_interval=2) for _ in range(2)]
    take_steps(model, optimizer, 3, scaler=scalers[0])
    scalers[1].load_state_dict(there_and_back(tmp_path, {"scaler": scalers[0].state_dict()})["scaler"])
    take_steps(model, optimizer, 3, scaler=scalers[0])
    take_steps(model, optimizer, 3, scaler=scalers[1])
    assert scalers[0].state_dict() == scalers[1].state_dict() != torch.amp.GradScaler("cpu").state_dict()


DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
]
ODD_NAN = struct.unpack(">d", bytes.fromhex("fff8dead00000001"))[0]


def odd_tree() -> dict[str, Any]:
    """Whatever a state_dict may hold, with the values that usually go wrong."""
    raw = torch.arange(48, dtype=torch.uint8)
    return {
        "dtypes": [(raw % 2 if dtype == torch.bool else raw).view(dtype) for dtype in DTYPES],
        "shapes": [torch.tensor(3.5), torch.empty(0), torch.empty(2, 0, 3), torch.arange(6.0).reshape(2, 3).T],
        "no shape": [torch.tensor(7, dtype=torch.uint32), torch.tensor(1j)],
        "floats": [0.1, -0.0, 1e-310, math.inf, -math.inf, math.nan, ODD_NAN],
        "ints": [0, True, -1, 2**63, 2**64, -(2**200), 10**5000],
        "texts": ["", "\0\n\x1b[31m", "é\u2028", "\ud800", "$tuple"],
        "keys": {1: "a", "1": "b", -(2**70): None, "$tensor": "x", "__metadata__": torch.ones(1)},
        "marks": {"$tuple": [1], "$dict": []},
        "nested": ((), [], {}, ([((None,),)],)),
        "numpy": [np.arange(4, dtype=">i2"), np.array(2.5), np.empty((0, 2), np.uint32), np.float64(0.1)],
        "numpy again": [np.bool_(True), np.uint32(7), np.int64(-1), np.complex128(1j), np.array([math.nan])],
        "a.b": torch.zeros(1),
        "a": {"b": torch.ones(1)},
        "__metadata__": torch.zeros(2),
    }  # fmt: skip


def test_every_value_of_a_state_dict_comes_back_as_what_it_was(tmp_path: Path) -> None:
    assert same(odd_tree(), there_and_back(tmp_path, odd_tree()))
    assert there_and_back(tmp_path, {}) == {}
    one = torch.ones(2)
    twice = there_and_back(tmp_path, {"a": one, "b": [one]})
    assert twice["a"] is twice["b"][0]
    assert there_and_back(tmp_path, {"ordered": OrderedDict(b=1, a=2)}) == {"ordered": {"b": 1, "a": 2}}


def test_the_same_tree_gives_the_same_bytes(tmp_path: Path) -> None:
    written = []
    for name in ("one", "two"):
        there_and_back(tmp_path / name, odd_tree())
        written.append([(tmp_path / name / file).read_bytes() for file in STATE_FILES])
    assert written[0] == written[1]


def test_a_snapshot_does_not_change_with_what_it_was_taken_of() -> None:
    weight, array = torch.nn.Parameter(torch.zeros(3)), np.zeros(3)
    numbers = [1]
    tree = {"weight": weight, "again": weight, "view": weight.detach()[1:], "array": array, "list": numbers}
    copy = snapshot(tree)
    assert copy["weight"] is copy["again"]
    assert not copy["weight"].requires_grad
    weight.detach().add_(1)
    array[:] = 1
    numbers.append(2)
    assert copy["weight"].tolist() == copy["array"].tolist() == [0, 0, 0]
    assert copy["view"].tolist() == [0, 0]
    assert copy["list"] == [1]


Point = namedtuple("Point", "x")


class Shard(torch.Tensor):
    pass


def too_deep() -> Any:
    value: Any = 1
    for _ in range(5000):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({1, 2}, "'x': |x: is of a class that cannot be saved; got builtins.set"),
        (lambda: 1, "x: is of a class that cannot be saved; got builtins.function"),
        (Point(1), "x: is of a class that cannot be saved; got .*Point"),
        (b"bytes", "x: is of a class that cannot be saved; got builtins.bytes"),
        (torch.float32, "x: is of a class that cannot be saved; got torch.dtype"),
        ([{1.5: 1}], "x.0: has a key that is neither text nor a number; got builtins.float"),
        (np.array(["text"]), "x: has a dtype that cannot be saved: <U4; got numpy.ndarray"),
        (np.array([None]), r"x: has a dtype that cannot be saved: \|O; got numpy.ndarray"),
        (torch.ones(2).to_sparse(), "x: holds a tensor that cannot be saved; got Tensor, torch.sparse_coo"),
        (torch.ones(2).as_subclass(Shard), "x: holds a tensor that cannot be saved; got Shard, torch.strided"),
        (torch.ones(2, dtype=torch.complex128), "x: has a dtype that cannot be saved: torch.complex128"),
        (too_deep(), "is more than 32 levels deep; got builtins.list"),
    ],
)
def test_a_value_that_could_not_be_read_back_is_refused_with_its_class(value: Any, named: str, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=named) as caught:
        write_state(tmp_path, {"x": value})
    assert TREE_FILE in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_the_random_numbers_go_on(tmp_path: Path) -> None:
    def draw() -> list[Any]:
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(2).tolist()]

    draw()  # a second normal number is now kept by Python and by NumPy
    back = there_and_back(tmp_path, rng_state())
    wanted = draw()
    draw()
    set_rng_state(back)
    assert draw() == wanted


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("python"),
        lambda state: state["python"].update(internal=np.arange(3)),
        lambda state: state["python"].update(version=4),
        lambda state: state["numpy"].update(bit_generator="Philox"),
        lambda state: state["numpy"]["state"].update(pos=10**9),
        lambda state: state.update(torch=torch.zeros(3)),
        lambda state: state.update(torch=[1]),
        lambda state: state.update(numpy=None),
    ],
)
def test_states_of_other_generators_are_refused(change: Callable[[dict[str, Any]], object]) -> None:
    state = rng_state()
    change(state)
    with pytest.raises(RunError, match="random generators: is not the state of this version's random generators; got"):
        set_rng_state(state)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state of a small optimizer."""
    folder, model = tmp_path_factory.mktemp("state"), small_model()
    optimizer = torch.optim.AdamW(model.parameters())
    take_steps(model, optimizer, 1)
    write_state(folder, snapshot({"optimizer": optimizer.state_dict(), "rng": rng_state(), "step": 1}))
    return folder


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def damages(content: bytes) -> dict[str, bytes | None]:
    """Name -> what the file holds then; None: it is missing."""
    at = random.Random(0)
    places = [at.randrange(len(content)) for _ in range(12)]
    return {
        "missing": None,
        "empty": b"",
        "zeroed": bytes(len(content)),
        "second half zeroed": content[: len(content) // 2].ljust(len(content), b"\0"),
        "longer": content + b"\0",
        "another file": b'{"state": {}}\n',
        "a pickle": b"\x80\x02}q\x00." + content[7:],
        **{f"cut at {place}": content[:place] for place in places},
        **{f"bit {8 * place + 3} flipped": flipped(content, 8 * place + 3) for place in (0, 20, 60, *places)},
    }


@pytest.mark.parametrize("file", STATE_FILES)
def test_a_damaged_file_is_named(file: str, written: Path, tmp_path: Path) -> None:
    content = (written / file).read_bytes()
    for what, damaged in damages(content).items():
        for name in STATE_FILES:
            shutil.copy(written / name, tmp_path / name)
        (tmp_path / file).unlink()
        if damaged is not None:
            (tmp_path / file).write_bytes(damaged)
        with pytest.raises(RunError) as caught:
            read_state(tmp_path)
        text = str(caught.value)
        # A bit in the checksum of the other file looks as if that one were damaged.
        assert text.startswith(str(tmp_path / file)) or "differs from its checksum in" in text, what
        assert text.endswith(f"remove {tmp_path}: the same command then continues from the checkpoint before it"), what
        assert "weights_only" not in text


def test_a_file_of_another_checkpoint_is_named(written: Path, tmp_path: Path) -> None:
    tree = read_state(written)
    tree["optimizer"]["state"][0]["exp_avg"] += 1
    there_and_back(tmp_path, tree)
    shutil.copy(written / TREE_FILE, tmp_path)
    with pytest.raises(RunError, match=f"{TENSORS_FILE}: differs from its checksum in {TREE_FILE}"):
        read_state(tmp_path)


def test_what_is_no_regular_file_is_refused_at_once(written: Path, tmp_path: Path) -> None:
    for file in STATE_FILES:
        for make in (os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)):
            folder = tmp_path / f"{file}-{len(list(tmp_path.iterdir()))}"
            shutil.copytree(written, folder)
            (folder / file).unlink()
            make(folder / file)
            with pytest.raises(RunError, match=f"{file}: is no file; got a folder or a device"):
                read_state(folder)


def write_by_hand(folder: Path, tree: str, header: bytes = b"{}", data: bytes = b"") -> None:
    """Files with the right checksums around any content."""
    tensors = len(header).to_bytes(8, "little") + header + data
    (folder / TENSORS_FILE).write_bytes(tensors)
    sums = (
        f'{{"format": 1, "tensors_crc32": {zlib.crc32(tensors)}, "tree_crc32": {zlib.crc32(tree.encode())}, "tree":\n'
    )
    (folder / TREE_FILE).write_text(sums + tree + "\n}\n")


HEADERS = {
    "beyond the file": {"t": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}},
    "negative": {"t": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}},
    "not the shape's bytes": {"t": {"dtype": "F32", "shape": [2**70], "data_offsets": [0, 4]}},
    "overlong numbers": {"t": {"dtype": "F32", "shape": [2**70, 0], "data_offsets": [0, 0]}},
    "no such dtype": {"t": {"dtype": "OBJECT", "shape": [1], "data_offsets": [0, 4]}},
    "no entry": {"t": 1},
    "not named": {"t": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_absurd_headers_are_refused(header: Any, tmp_path: Path) -> None:
    write_by_hand(tmp_path, "{}", json.dumps(header).encode(), b"\0" * 4)
    with pytest.raises(RunError, match=f"{TENSORS_FILE}: "):
        read_state(tmp_path)


@pytest.mark.parametrize("header", [b"[" * 100_000, b'{"a":' * 50_000, b"[]", b"\xff", b"1" * 5000])
def test_headers_that_are_no_json_object_are_refused(header: bytes, tmp_path: Path) -> None:
    write_by_hand(tmp_path, "{}", header)
    with pytest.raises(RunError, match=f"{TENSORS_FILE}: cannot be read as safetensors"):
        read_state(tmp_path)


@pytest.mark.parametrize(
    "tree",
    [
        *("[" * 100_000, '{"a":' * 50_000, "[]", "1", "", "{", '{"a": NaN', '{"a": ' + "9" * 5000 + "}"),
        '{"a":' + "[" * 70 + "]" * 70 + "}",
        *('{"$unknown": 1}', '{"a": {"$tensor": "none"}}', '{"a": {"$tensor": []}}', '{"$tuple": 1}', '{"$dict": [1]}'),
        *('{"$dict": [[[], 1]]}', '{"$int": "x"}', '{"$int": 1}', '{"$float": "00"}', '{"$array": "t"}'),
        '{"$array": "t", "dtype": "O", "shape": [1]}',
        '{"a": {"$tensor": "t", "dtype": "os.system", "shape": [1]}}',
        '{"a": {"$array": "t", "dtype": "<f8", "shape": [1]}}',
        '{"a": {"$array": "t", "dtype": "|u1", "shape": [1e9, -1]}}',
        '{"a": {"$tensor": "t", "dtype": "torch.uint16", "shape": [1000000]}}',
        '{"a": {"$scalar": "t", "dtype": "<c64"}}',
    ],
    ids=lambda tree: tree[:30],
)  # fmt: skip
def test_absurd_trees_with_right_checksums_are_refused(tree: str, tmp_path: Path) -> None:
    used = '"t"' in tree
    header = b'{"t":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}' if used else b"{}"
    write_by_hand(tmp_path, tree, header, b"\0" * (3 if used else 0))
    started = time.monotonic()
    with pytest.raises(RunError, match=f"{TREE_FILE}: "):
        read_state(tmp_path)
    assert time.monotonic() - started < 5


def test_a_file_of_gigabytes_is_refused_before_it_is_read(written: Path, tmp_path: Path) -> None:
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    os.truncate(tmp_path / TREE_FILE, 2**40)
    with pytest.raises(RunError, match=f"{TREE_FILE}: has more than {MAX_JSON_BYTES} bytes; got {2**40} bytes"):
        read_state(tmp_path)
    shutil.copy(written / TREE_FILE, tmp_path)
    tensors = (2**39).to_bytes(8, "little") + b"{}"
    (tmp_path / TENSORS_FILE).write_bytes(tensors)
    write_by_hand(tmp_path, "{}")
    (tmp_path / TENSORS_FILE).write_bytes(tensors)
    first = f'{{"format": 1, "tensors_crc32": {zlib.crc32(tensors)}, "tree_crc32": {zlib.crc32(b"{}")}, "tree":\n'
    (tmp_path / TREE_FILE).write_text(first + "{}\n}\n")
    with pytest.raises(RunError, match=f"{TENSORS_FILE}: has a header of more than {MAX_JSON_BYTES} bytes"):
        read_state(tmp_path)
