"""`--dry-run` writes nothing, tells what a run will take, and what to change if it does not fit."""

import json
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from training import Ranks, arguments, make_data

import zeroi2v.train.estimate
from zeroi2v.cli import run
from zeroi2v.train.estimate import (
    Cost,
    forget_peak,
    group_memory,
    measure_run,
    memory_limit,
    peak_memory,
)
from zeroi2v.train.main import main

# Two sizes whose activations are much of what the process holds, and 12 clips at once.
SIZES = {
    "small": ("model.width=256", "model.num_heads=4", "model.head_offsets=[-1,1,0,0]"),
    "wide": ("model.width=512", "model.num_heads=8", "model.head_offsets=[-1,1,0,0,0,0,0,0]"),
}
COMMON = (
    "model.image_size=112",
    "model.preprocess.val_short_side=null",
    "model.depth=3",
    "optim.micro_batch=12",
    "optim.batch_size=12",
    "data.val_list=null",
    "optim.epochs=2",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def believe_extrapolation() -> None:
    zeroi2v.train.estimate.SAFE = 0.0


@pytest.mark.parametrize("size, memory", [("small", "save"), ("wide", "recompute")])
def test_estimated_memory_is_within_15_percent_of_the_runs(data, tmp_path, size, memory):
    """Measured or extrapolated. Each in a process of its own, which tells its peak at the end."""
    words = arguments(data, tmp_path / "run", *SIZES[size], *COMMON, f"optim.memory={memory}")
    estimates = []
    for before in (None, believe_extrapolation):
        output = tmp_path / f"dry-{before}.txt"
        with Ranks([*words, "--dry-run"], count=1, output=output, before=before) as ranks:
            assert ranks.wait(200) == [0], ranks.text()
            assert ("extrapolated" in ranks.text()) == (before is not None)
            estimates.append(json.loads(ranks.text().splitlines()[-2]))
    assert not (tmp_path / "run").exists()
    with Ranks(words, count=1, output=tmp_path / "run.txt") as ranks:
        assert ranks.wait(200) == [0], ranks.text()
        peak = int(re.search(r"peak (\d+) bytes", ranks.text())[1])
    for estimate in estimates:
        assert estimate["fits"] and estimate["memory_gb"] * 1e9 == pytest.approx(peak, rel=0.15)


def test_what_was_held_before_a_measurement_is_not_in_it(monkeypatch):
    """The passes that are extrapolated from may have more clips than the run."""
    engine = SimpleNamespace(device=torch.device("cpu"))
    monkeypatch.setattr(zeroi2v.train.estimate, "run_pass", lambda *_: torch.ones(2**24))  # 64 MiB
    forget_peak(engine.device)
    held = torch.ones(2**27)  # 512 MiB
    before = peak_memory(engine.device)
    del held
    peak = measure_run(engine, None, 1, None)[0]
    # 448 MiB less, or 384 where the first pass's memory is given back late.
    assert before - 480 * 2**20 < peak < before - 350 * 2**20


def test_dry_run_prints_config_counts_steps_memory_and_time(data, tmp_path, capsys):
    main([*arguments(data, tmp_path / "run", "data.workers=1"), "--dry-run"])
    output = capsys.readouterr().out
    assert "head_offsets:" in output and "seed: 0" in output
    assert "parameters  4,740 trained, 50,240 frozen" in output
    assert "schedule    8 steps = 2 epochs x 4" in output
    assert re.search(r"memory      \d+\.\d\d GB at most in a process; each may use", output)
    assert re.search(r"may use \d+\.\d of \d+\.\d GB \(measured; .* each of 2 clips", output)
    assert re.search(r"time        \d+\.\d\d s a step: .* an epoch, .* in all", output)
    assert "verdict     fits" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_dry_run_ends_at_the_first_signal(data, tmp_path, monkeypatch, capsys, number):
    measured = []

    def interrupted(*_):
        measured.append(number)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(zeroi2v.train.estimate, "measure_pass", interrupted)
    assert run(main, [*arguments(data, tmp_path / "run"), "--dry-run"]) == 130
    assert measured == [number] and capsys.readouterr().err.endswith("stopped\n")


@pytest.mark.parametrize("precision, has_bf16, noted", [
    ("bf16", False, True), ("bf16", True, False), ("fp32", False, False),
])  # fmt: skip
def test_a_cpu_without_bf16_is_said_to_be_slow_with_it(
    data, tmp_path, monkeypatch, capsys, precision, has_bf16, noted
):
    monkeypatch.setattr("zeroi2v.train.prepare.cpu_has_bf16", lambda: has_bf16)
    monkeypatch.setattr("zeroi2v.train.main.estimate", lambda job, signals: 0)
    main([*arguments(data, tmp_path / "run", f"optim.precision={precision}"), "--dry-run"])
    assert ("this CPU has no bf16" in capsys.readouterr().out) == noted


def test_dry_run_says_what_to_change_when_the_run_does_not_fit(data, tmp_path, monkeypatch, capsys):
    costs = {"save": Cost(100e6, 40e6), "lean": Cost(100e6, 30e6), "recompute": Cost(100e6, 10e6)}

    def measure(engine, clip, optim):
        return costs[engine.module.transformer.resblocks[0].memory], Cost(0.1, 0.1)

    monkeypatch.setattr(zeroi2v.train.estimate, "measure", measure)
    monkeypatch.setattr(zeroi2v.train.estimate, "memory_limit", lambda device: (190e6, 1e9))
    main([*arguments(data, tmp_path / "run", "optim.batch_size=16", "optim.micro_batch=8"),
          "--dry-run"])  # fmt: skip
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("verdict")]
    assert lines == [
        "verdict     does NOT fit",
        "verdict     fits with optim.micro_batch=2: 0.18 GB",
        "verdict     fits with optim.memory=lean optim.micro_batch=2: 0.16 GB",
        "verdict     fits with optim.memory=recompute: 0.18 GB",
    ]
    monkeypatch.setattr(zeroi2v.train.estimate, "memory_limit", lambda device: (50e6, 1e9))
    main([*arguments(data, tmp_path / "run"), "--dry-run"])
    assert "no option helps: 0.11 GB even for one clip at a time" in capsys.readouterr().out


def test_memory_of_a_gpu_is_what_is_free_and_what_this_process_holds(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (30, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 5)
    assert memory_limit(torch.device("cuda")) == (35, 80)


def test_memory_of_a_machine_is_what_its_control_group_leaves(monkeypatch, tmp_path):
    """Files that are kept in memory give way."""
    for name, allowed, used in (("outer", "1000", 700), ("outer/inner", "max", 300)):
        group = tmp_path / name
        group.mkdir()
        (group / "memory.max").write_text(f"{allowed}\n")
        (group / "memory.current").write_text(f"{used}\n")
        (group / "memory.stat").write_text("anon 1\nactive_file 20\ninactive_file 80\n")
    read_text = Path.read_text

    def stand_in(path, *args, **kwargs):
        if str(path) == "/proc/self/cgroup":
            return "4:memory:/elsewhere\n0::/outer/inner\n"
        return read_text(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", stand_in)
    assert group_memory(tmp_path) == [(400, 1000)]
    assert group_memory(tmp_path / "none") == []

    machine = SimpleNamespace(available=6000, total=9000)
    own = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=70))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    monkeypatch.setattr(psutil, "Process", lambda: own)
    monkeypatch.setattr(zeroi2v.train.estimate, "group_memory", lambda: [(400, 1000)])
    monkeypatch.setattr(zeroi2v.train.estimate, "gather", lambda value: [value, value])
    monkeypatch.setattr(zeroi2v.train.estimate.dist, "get_world_size", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert memory_limit(torch.device("cpu")) == (270, 1000)
