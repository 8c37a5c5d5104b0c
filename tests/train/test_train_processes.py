"""How the processes of a run meet, agree, and notice that one of them is lost."""

import json
import os
import signal
import socket
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from training import Ranks, arguments, make_data, wait_for

import zeroi2v.processes
import zeroi2v.train.distributed
import zeroi2v.train.engine
import zeroi2v.train.main
from zeroi2v.processes import check_gpus, cores_per_process, end_processes
from zeroi2v.train.distributed import start_processes
from zeroi2v.train.engine import read_later, update
from zeroi2v.train.log import read_log

RUN = ("optim.epochs=100", "optim.micro_batch=1", "data.val_list=null", "run.resume=auto")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def no_ranks(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def test_lone_process_trains_without_any_port(data, tmp_path, monkeypatch, no_ranks):
    monkeypatch.setattr(socket.socket, "bind", lambda *_: pytest.fail("a port is bound"))
    monkeypatch.setattr(dist, "TCPStore", lambda *_, **__: pytest.fail("a store listens"))
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: pytest.fail("a port is needed"))
    monkeypatch.setattr(zeroi2v.train.main, "write_report", lambda folder: None)
    zeroi2v.train.main.main(
        arguments(data, tmp_path / "run", "run.max_steps=1", "data.val_list=null")
    )
    assert [line["step"] for line in read_log(tmp_path / "run")] == [1]
    assert "MASTER_PORT" not in os.environ


def test_what_processes_tell_each_other_goes_over_gloo_apart_from_gradients(monkeypatch):
    groups = []
    for name in ("all_reduce", "all_gather_object"):
        call = getattr(dist, name)

        def recorded(*args, call=call, group=None):
            groups.append(group)
            return call(*args, group=group)

        monkeypatch.setattr(dist, name, recorded)
    monkeypatch.setattr(dist, "barrier", lambda *_, **__: pytest.fail("asks the GPU"))
    start_processes()
    try:
        assert zeroi2v.processes.add_up([1.5, 2]) == [1.5, 2.0]
        assert zeroi2v.processes.gather("x") == ["x"]
        zeroi2v.processes.wait_for_all()
        assert len(groups) == 3
        for group in groups:
            assert group is not None and group is not dist.group.WORLD
            assert dist.get_backend(group) == "gloo"
    finally:
        end_processes()


def short_limit() -> None:
    for module in (zeroi2v.processes, zeroi2v.train.distributed, zeroi2v.train.engine):
        module.limit = lambda: timedelta(seconds=10)


def at_third_step(action) -> None:
    """Rank 1 does `action` before it tells of its third step."""
    share, calls = zeroi2v.train.main.share, []

    def stopped(*args):
        calls.append(1)
        if os.environ["RANK"] == "1" and len(calls) == 3:
            action()
        return share(*args)

    zeroi2v.train.main.share = stopped


def die() -> None:
    at_third_step(lambda: os.kill(os.getpid(), signal.SIGKILL))


def stick() -> None:
    short_limit()
    at_third_step(lambda: time.sleep(600))


def fail() -> None:
    def raise_error():
        raise ValueError("rank 1 met this")

    at_third_step(raise_error)


@pytest.mark.parametrize(("before", "count"), [(die, 4), (stick, 2), (fail, 2)])
def test_process_that_dies_sticks_or_fails_ends_the_others_in_one_line(
    data, tmp_path, count, before
):
    words = arguments(data, tmp_path / "run", *RUN)
    with Ranks(words, count=count, output=tmp_path / "text", before=before) as ranks:
        others = [p for rank, p in enumerate(ranks.processes) if rank != 1]
        wait_for(lambda: len(read_log(tmp_path / "run")) >= 2, 200)
        begun = time.monotonic()
        # Where one has died or failed, long before the limit of 10 minutes: nobody waits for it.
        wait_for(lambda: all(process.exitcode is not None for process in others), 200)
        seconds = time.monotonic() - begun
        assert {process.exitcode for process in others} == {1}, ranks.text()
        (line,) = ranks.errors()
        if before is fail:
            assert line == "error: rank 1 met this"
        else:
            assert "a process of this run has died or is stuck" in line and "auto" in line
        if before is stick:
            assert seconds > 6, (seconds, ranks.text())


def test_more_processes_than_gpus_are_told_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    store = dist.HashStore()
    for rank in (1, 2, 3):
        store.set(f"gpus_{rank}", "got 4 for 2" if rank > 1 else "")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit):
            check_gpus(store)
    assert capsys.readouterr().err == (
        "error: processes of a machine (--num_gpus, --nproc_per_node) must be at most its GPUs: "
        "got 4 for 2\n"
    )
    for rank in (2, 3):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        with pytest.raises(SystemExit):
            check_gpus(store)
        assert store.get(f"gpus_{rank}") == b"got 4 for 2"
    assert capsys.readouterr().err == ""


def test_lone_process_without_a_gpu_of_its_number_and_processes_with_enough(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="must be at most its GPUs: got 1 for 1"):
        check_gpus(dist.HashStore())
    monkeypatch.setenv("LOCAL_RANK", "0")
    check_gpus(dist.HashStore())


def test_cores_are_shared_by_the_processes_of_this_machine_not_of_all(monkeypatch):
    """DeepSpeed's launcher tells their number by another name than torchrun."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "32")
    monkeypatch.setenv("LOCAL_SIZE", "8")
    assert cores_per_process() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert cores_per_process() == 16


class NumberOnGPU:
    """Stands for a tensor on a GPU that becomes 2.5 when its event has come to pass."""

    is_cuda = True

    def to(self, device, non_blocking):
        assert device == "cpu" and non_blocking
        return torch.tensor(2.5)


def test_loss_on_a_gpu_is_waited_for_by_its_event_and_not_for_ever(monkeypatch):
    states, made = [False, False, True], []
    event = SimpleNamespace(record=lambda: made.append("recorded"), query=lambda: states.pop(0))
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: pytest.fail("waits for all"))
    monkeypatch.setattr(zeroi2v.train.engine, "limit", lambda: timedelta(seconds=1))
    read = read_later(NumberOnGPU())
    assert made == ["recorded"] and len(states) == 3
    assert read() == 2.5 and states == []
    event.query = lambda: False
    with pytest.raises(RuntimeError, match="the GPU timed out"):
        read_later(NumberOnGPU())()


def test_loss_is_asked_for_before_the_last_backward_and_awaited_after_it(
    data, tmp_path, monkeypatch
):
    order = []
    build_engine = zeroi2v.train.main.build_engine

    def build(*args):
        engine = build_engine(*args)
        backward, step = engine.backward, engine.step
        engine.backward = lambda loss: order.append("backward") or backward(loss)
        engine.step = lambda: order.append("step") or step()
        return engine

    def read(number):
        order.append("asked")
        return lambda: order.append("awaited") or number.item()

    monkeypatch.setattr(zeroi2v.train.main, "build_engine", build)
    monkeypatch.setattr(zeroi2v.train.main, "read_later", read)
    monkeypatch.setattr(zeroi2v.train.main, "write_report", lambda folder: None)
    zeroi2v.train.main.main(
        arguments(data, tmp_path / "run", "run.max_steps=1", "data.val_list=null")
    )
    assert order == ["backward", "step", "asked", "backward", "awaited", "step"]


def test_schedule_goes_on_where_fp16_leaves_a_step_out_and_no_scale_left_is_told():
    steps = []
    engine = SimpleNamespace(
        step=lambda: None,
        was_step_applied=lambda: False,
        lr_scheduler=SimpleNamespace(step=lambda: steps.append(1)),
    )
    update(engine)
    engine.was_step_applied = lambda: True  # DeepSpeed has moved the schedule itself
    update(engine)
    assert steps == [1]

    def exhausted():
        raise Exception("Current loss scale already at minimum - cannot decrease scale anymore.")

    engine.step = exhausted
    with pytest.raises(ValueError, match="gradients must be finite in fp16"):
        update(engine)


def test_dry_run_of_a_lone_process_needs_no_port_either(data, tmp_path, capsys, no_ranks):
    zeroi2v.train.main.main([*arguments(data, tmp_path / "run"), "--dry-run"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["fits"]
