"""Restart registers: exact to the bit in memory and on disk, whole or refused by name."""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import random
import resource
import shutil
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import DEVICES, make_params, set_grads

from lhopt_fused import LHOPT, registers
from lhopt_fused.registers import RegisterFileError, RestartRegisters, state_bytes

State = dict[str, torch.Tensor]


def random_state(seed: int) -> State:
    """Every kind of tensor that a training state may have, among them views of one buffer."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    shared = normal(40)
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 5e-324], dtype=torch.float64)
    return {
        "float32": normal(7, 5),
        "float64": torch.cat([special, normal(3).double()]),
        "bfloat16": normal(9).bfloat16(),
        "float16": normal(4, 2).half(),
        "bits": torch.randint(256, (11,), generator=generator, dtype=torch.uint8),
        "transposed": normal(3, 4).t(),
        "number": normal(),
        "empty": normal(0, 3),
        "view.0": shared[:16].view(4, 4),
        "view.1": shared[20:],
    }


def bits(state: State) -> dict[str, bytes]:
    return {
        name: value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        for name, value in state.items()
    }


def make(on_disk: bool, folder: Path, count: int = 3) -> RestartRegisters:
    return RestartRegisters(count, folder if on_disk else None)


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


in_memory_and_on_disk = pytest.mark.parametrize("on_disk", [False, True])


@in_memory_and_on_disk
def test_what_is_saved_comes_back_to_the_bit(on_disk: bool, tmp_path: Path) -> None:
    held, state = make(on_disk, tmp_path), random_state(0)
    saved = bits(state)
    held.save(1, state, 2.5, 0.25)
    assert (held.losses[1], held.progress[1]) == (2.5, 0.25)
    for seed in (1, 2):  # a register may be taken from again and again
        for name, value in random_state(seed).items():
            state[name].copy_(value)
        assert bits(state) != saved
        assert held.load(1, state)
        assert bits(state) == saved
    assert not held.load(0, state)
    assert bits(state) == saved


@in_memory_and_on_disk
def test_swap_exchanges(on_disk: bool, tmp_path: Path) -> None:
    held, state, other = make(on_disk, tmp_path), random_state(0), random_state(1)
    first, second = bits(state), bits(other)
    assert not held.swap(2, state, 1.0, 0.1)
    assert bits(state) == first
    assert held.swap(2, other, 2.0, 0.2)
    assert (bits(other), held.losses[2], held.progress[2]) == (first, 2.0, 0.2)
    assert held.load(2, other)
    assert bits(other) == second


@in_memory_and_on_disk
def test_the_state_of_other_tensors_is_refused(on_disk: bool, tmp_path: Path) -> None:
    held, state = make(on_disk, tmp_path), random_state(0)
    held.save(0, state, 1.0, 0.1)
    others: dict[str, State] = {
        "shape": {**state, "float32": torch.zeros(5, 7)},
        "dtype": {**state, "float32": state["float32"].double()},
        "missing": {name: value for name, value in state.items() if name != "bits"},
        "more": {**state, "late": torch.zeros(2)},
    }
    for other in others.values():
        before = bits(other)
        for use in (held.load, lambda i, s: held.swap(i, s, 2.0, 0.2)):
            with pytest.raises(ValueError, match="register 0 holds the state of other tensors"):
                use(0, other)
        assert bits(other) == before
    assert held.losses[0] == 1.0
    held.save(0, others["more"], 2.0, 0.2)  # but it can be filled anew
    assert held.load(0, others["more"])


@in_memory_and_on_disk
def test_there_are_as_many_as_were_asked_for(on_disk: bool, tmp_path: Path) -> None:
    held, state = make(on_disk, tmp_path), random_state(0)
    for index in (-1, 3):
        for use in (
            lambda: held.save(index, state, 0.0, 0.0),  # noqa: B023
            lambda: held.load(index, state),  # noqa: B023
            lambda: held.swap(index, state, 0.0, 0.0),  # noqa: B023
        ):
            with pytest.raises(IndexError, match=f"no restart register {index}; there are 3"):
                use()


def test_bad_arguments(tmp_path: Path) -> None:
    for count in (-1, 1.0, True, "3"):
        with pytest.raises(ValueError, match="restart_registers must be a number >= 0"):
            RestartRegisters(count)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"register_folder is .* but restart_registers is 0"):
        LHOPT(make_params(), 8, register_folder=tmp_path)


# ---------------------------------------------------------------------- copies and checkpoints


@pytest.mark.parametrize("to_disk", [False, True])
@in_memory_and_on_disk
def test_contents_go_through_a_checkpoint(on_disk: bool, to_disk: bool, tmp_path: Path) -> None:
    held, state = make(on_disk, tmp_path / "first"), random_state(0)
    held.save(1, state, 2.5, 0.25)
    buffer = io.BytesIO()
    torch.save(held.state_dict(), buffer)
    del held
    resumed, other = make(to_disk, tmp_path / "second"), random_state(1)
    resumed.save(0, other, 1.0, 0.1)
    resumed.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
    assert not resumed.load(0, other)
    assert resumed.load(1, other)
    assert (bits(other), resumed.losses[1], resumed.progress[1]) == (bits(state), 2.5, 0.25)
    with pytest.raises(ValueError, match="has 3 restart registers, the optimizer 2"):
        make(to_disk, tmp_path / "second", 2).load_state_dict(resumed.state_dict())


@pytest.mark.parametrize("through", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@in_memory_and_on_disk
def test_copies_go_their_own_way(on_disk: bool, through: Any, tmp_path: Path) -> None:
    held, state, other = make(on_disk, tmp_path), random_state(0), random_state(1)
    held.save(0, state, 1.0, 0.1)
    copied = through(held)
    held.save(0, other, 2.0, 0.2)
    held.save(1, other, 2.0, 0.2)
    mine = random_state(2)
    assert copied.load(0, mine)
    assert bits(mine) == bits(state)
    assert not copied.load(1, mine)
    assert copied.losses[0] == 1.0


def run(optimizer: LHOPT, params: list[torch.nn.Parameter], first: int, last: int) -> None:
    for step in range(first, last):
        set_grads(params, step)
        optimizer.step()


@pytest.mark.parametrize("saved_at", [3, 6, 9])
def test_a_run_with_registers_on_disk_resumes(saved_at: int, tmp_path: Path) -> None:
    """Saved, gone on with other contents, and resumed where the old files are no more."""

    def use(optimizer: LHOPT, step: int) -> None:
        {4: optimizer.save_register, 7: optimizer.swap_register, 10: optimizer.load_register}.get(
            step, lambda index: None
        )(1)

    def train(optimizer: LHOPT, params: list[torch.nn.Parameter], first: int) -> None:
        for step in range(first, 14):
            run(optimizer, params, step, step + 1)
            use(optimizer, step)
            if step + 1 == saved_at and first == 0:
                torch.save((params, optimizer.state_dict()), tmp_path / "run.pt")

    def make_run(params: list[torch.nn.Parameter], folder: str) -> LHOPT:
        return LHOPT(params, 20, restart_registers=2, register_folder=tmp_path / folder)

    params = make_params(torch.bfloat16)
    train(make_run(params, "first"), params, 0)
    shutil.rmtree(tmp_path / "first")
    loaded, saved = torch.load(tmp_path / "run.pt", weights_only=True)
    resumed = make_run(loaded, "second")
    resumed.load_state_dict(saved)
    train(resumed, loaded, saved_at)
    assert all(torch.equal(p, q) for p, q in zip(params, loaded, strict=True))


def test_the_memory_is_stated_before_it_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    params = make_params()
    optimizer = LHOPT(params, 20, restart_registers=1, register_folder=tmp_path)
    with pytest.raises(RuntimeError, match="no training state yet"):
        optimizer.save_register(0)
    run(optimizer, params, 0, 1)
    with caplog.at_level("INFO", "lhopt_fused"):
        optimizer.save_register(0)
        optimizer.save_register(0)
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"restart register 0 takes {optimizer.register_bytes} bytes in {tmp_path}"]
    assert 0 <= files(tmp_path)[0].stat().st_size - optimizer.register_bytes < 16_384  # its header
    assert optimizer.register_bytes >= 3 * sum(p.nbytes for p in params)


@pytest.mark.parametrize("device", DEVICES)
def test_host_memory_is_pinned_where_the_state_is_on_a_gpu(device: str) -> None:
    state = {"p": torch.randn(1000, device=device), "m": torch.randn(10, device=device)}
    held, saved = RestartRegisters(1), {name: value.clone() for name, value in state.items()}
    resumed = {name: value.cpu() for name, value in state.items()}
    held.load_state_dict({"losses": [0.0], "progress": [0.0], "held": {"0": resumed}})
    held.save(0, state, 1.0, 0.1)
    on_host = held.state_dict()["held"]["0"].values()
    assert all(value.is_pinned() == (device == "cuda") for value in on_host)
    for value in state.values():
        value.zero_()
    assert held.load(0, state)
    assert all(torch.equal(state[name], saved[name]) for name in state)


# ---------------------------------------------------------------------- files


def test_files_go_with_their_registers_and_leave_others_alone(tmp_path: Path) -> None:
    foreign = {name: tmp_path / name for name in ("register_0.safetensors", "notes.txt")}
    for path in foreign.values():
        path.write_text("mine")
    one, two = RestartRegisters(1, tmp_path), RestartRegisters(1, tmp_path)
    state, other = random_state(0), random_state(1)
    one.save(0, state, 1.0, 0.1)
    two.save(0, other, 2.0, 0.2)
    assert len(files(tmp_path)) == 4
    mine = random_state(2)
    assert one.load(0, mine)
    assert bits(mine) == bits(state)
    del one, two
    gc.collect()
    assert files(tmp_path) == sorted(foreign.values())
    assert all(path.read_text() == "mine" for path in foreign.values())


def test_a_forked_child_does_not_take_the_files_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = RestartRegisters(1, tmp_path)
    held.save(0, random_state(0), 1.0, 0.1)
    parent = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: parent + 1)
    del held
    gc.collect()
    assert len(files(tmp_path)) == 1


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writes beyond ``size`` bytes fail, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_full_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, state, other = RestartRegisters(2, tmp_path), random_state(0), random_state(1)
    held.save(0, state, 1.0, 0.1)
    usage = namedtuple("usage", ["total", "used", "free"])

    def check(reason: str) -> None:
        current = bits(other)
        message = rf"register \d takes {state_bytes(other)} bytes that cannot be written.*{reason}"
        for index in (0, 1):
            with pytest.raises(RegisterFileError, match=message):
                held.save(index, other, 2.0, 0.2)
            with pytest.raises(RegisterFileError, match=message):
                held.swap(index, other, 2.0, 0.2)
        assert bits(other) == current
        assert len(files(tmp_path)) == 1, "a part of a file has been left"
        mine = random_state(2)
        assert held.load(0, mine)
        assert not held.load(1, mine)
        assert (bits(mine), held.losses[0]) == (bits(state), 1.0)

    with largest_file(100):
        check("File too large")
    monkeypatch.setattr(registers.shutil, "disk_usage", lambda folder: usage(9, 8, 1))
    check("1 bytes are free")


def test_folders_that_cannot_be_written_are_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(RegisterFileError, match=f"register_folder {folder} cannot be written"):
            LHOPT(make_params(), 8, restart_registers=1, register_folder=folder)

    def refuse(dir: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(registers.tempfile, "TemporaryFile", refuse)  # whoever runs the tests
    with pytest.raises(RegisterFileError, match="Permission denied; give a folder that can"):
        RestartRegisters(1, tmp_path)


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    held, state = RestartRegisters(2, tmp_path), random_state(0)
    held.save(1, state, 1.0, 0.1)
    (path,) = files(tmp_path)
    path.unlink()
    before = bits(state)
    for use in (lambda: held.load(1, state), lambda: held.swap(1, state, 0.0, 0.0)):
        with pytest.raises(RegisterFileError, match=f"register 1 is gone.*{path}"):
            use()
    with pytest.raises(RegisterFileError, match="register 1 is gone"):
        held.state_dict()
    assert bits(state) == before
    held.save(1, state, 1.0, 0.1)  # and is whole again once it has been saved
    assert held.load(1, state)


def damaged_files(whole: bytes) -> Iterator[bytes]:
    chance = random.Random(0)
    yield from (b"", b"\0" * len(whole), pickle.dumps({"param": 0}), whole + b"\0")
    yield from (whole[: chance.randrange(len(whole))] for _ in range(50))
    for _ in range(300):
        flipped = bytearray(whole)
        flipped[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        yield bytes(flipped)


def test_a_file_that_is_damaged_is_named(tmp_path: Path) -> None:
    """Any flipped bit and any missing end, in the header as well as in the tensors."""
    held, state = RestartRegisters(1, tmp_path), random_state(0)
    held.save(0, state, 1.0, 0.1)
    (path,) = files(tmp_path)
    whole, before = path.read_bytes(), bits(random_state(1))
    for damaged in damaged_files(whole):
        path.write_bytes(damaged)
        other = random_state(1)
        with pytest.raises(RegisterFileError, match=f"register 0 is damaged: {path}"):
            held.load(0, other)
        assert bits(other) == before
    path.write_bytes(whole)
    assert held.load(0, state)
