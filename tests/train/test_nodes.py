"""The snippets for many nodes, run as they stand in `docs/training.md`; processes stand for nodes.

A node's files are told apart by their mode: the second node creates its files without read access
for others.
"""

import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from models import build, small_config
from torch.distributed import distributed_c10d
from training import finish, held_port
from videos import write_numbered

from zeroi2v import VideoViT
from zeroi2v.processes import end_processes
from zeroi2v.train.config import OptimConfig, find_config
from zeroi2v.train.distributed import start_processes
from zeroi2v.train.engine import build_engine
from zeroi2v.train.log import read_log

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def snippet(kind: str) -> str:
    """The block of `kind` in the documentation."""
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    (block,) = re.findall(rf"^```{kind}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return block


def environment(**values: str) -> dict[str, str]:
    ours = ("RANK", "WORLD_SIZE", "MASTER_", "SLURM_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(ours) and "LOCAL_" not in k}
    return env | {"OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{env['PATH']}"} | values


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("nodes")
    for i in range(8):
        write_numbered(folder / f"{i}.mp4", 6, size=(32, 32))
    (folder / "list.txt").write_text("".join(f"{i}.mp4 {i % 2}\n" for i in range(8)))
    values = {
        "model": {"image_size": 32, "width": 32, "depth": 1, "num_heads": 2, "num_frames": 4,
                  "num_classes": 2, "head_offsets": [-1, 1],
                  "preprocess": {"sampling": "uniform", "val_short_side": 32}},
        "data": {"train_list": str(folder / "list.txt"), "val_list": str(folder / "list.txt"),
                 "root": str(folder), "workers": 0},
        "augment": None,
        "optim": {"epochs": 2, "batch_size": 4, "micro_batch": 2, "warmup_epochs": 0},
        "run": {"dir": "unset", "log_every": 1},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return folder / "config.yaml"


@pytest.fixture
def port() -> Iterator[str]:
    with held_port() as number:
        yield str(number)


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/bash\n{text}")
    path.chmod(0o755)


def end_node(launcher: subprocess.Popen) -> None:
    """Kills a launcher and all that it has started, which is in sessions of its own."""
    everyone = family(launcher.pid) if launcher.poll() is None else []
    for pid in everyone:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def family(pid: int) -> list[int]:
    """`pid`, its children, and theirs; Linux's own list of children may leave some out."""
    return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]


def written_by_second_node(run_dir: Path) -> list[str]:
    """Files, as paths below `run_dir`, that the node without read access for others made."""
    return sorted(
        str(path.relative_to(run_dir))
        for path in run_dir.rglob("*")
        if path.is_file() and not stat.S_IMODE(path.stat().st_mode) & stat.S_IRGRP
    )


def test_slurm_script_trains_one_run_whose_files_are_the_first_nodes_but_for_optimizer_state(
    config, tmp_path
):
    """`srun` and `scontrol` are stood in for: two tasks on this machine, numbered as Slurm does."""
    fakes = tmp_path / "slurm"
    fakes.mkdir()
    script(fakes / "scontrol", "echo 127.0.0.1; echo 127.0.0.2\n")
    script(
        fakes / "srun",
        '[ "$1" = --kill-on-bad-exit=1 ] && shift || exit 9\n'
        '(umask 022; SLURM_NODEID=0 "$@") & first=$!\n'
        '(umask 077; SLURM_NODEID=1 "$@") & second=$!\n'
        "wait $first; status=$?\nwait $second || status=$?\nexit $status\n",
    )
    (tmp_path / "train.slurm").write_text(snippet("slurm"))
    run_dir = tmp_path / "run"
    with held_port() as port:
        slurm = {
            "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_JOB_ID": str(port - 20000),
        }  # fmt: skip
        done = finish(
            ["bash", str(tmp_path / "train.slurm"), "--config", str(config), f"run.dir={run_dir}"],
            cwd=ROOT, timeout=240,
            env=environment(**slurm, PATH=f"{fakes}:{BIN}:{os.environ['PATH']}"),
        )  # fmt: skip
    assert done.stdout.count('"finished": true') == 1
    assert "4 clips = 2 x 2 processes x 1 accumulated" in done.stdout
    assert [line["step"] for line in read_log(run_dir) if "loss" in line] == [1, 2, 3, 4]
    assert VideoViT.from_pretrained(run_dir / "best").config.num_classes == 2
    assert (run_dir / "report.html").is_file()
    others = written_by_second_node(run_dir)
    assert len(others) <= 1 and all(re.fullmatch(r"state/.*rank_1.*", name) for name in others)


def test_kubernetes_job_is_well_formed_and_a_lost_node_ends_the_other_which_can_go_on(
    config, tmp_path, port
):
    service, job = yaml.safe_load_all(snippet("kubernetes"))
    (container,) = job["spec"]["template"]["spec"]["containers"]
    env = {entry["name"]: entry["value"] for entry in container["env"]}
    nodes = job["spec"]["completions"]
    assert nodes == job["spec"]["parallelism"] == int(env["NODES"])
    assert job["spec"]["completionMode"] == "Indexed"
    subdomain = job["spec"]["template"]["spec"]["subdomain"]
    assert env["MASTER_ADDR"] == f"{job['metadata']['name']}-0.{subdomain}"
    assert service["metadata"]["name"] == subdomain and service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(env["GPUS"])
    volumes = {volume["name"] for volume in job["spec"]["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    assert env["RUN_DIR"].startswith("/storage/") and env["VIDEOS"].startswith("/storage/")
    assert find_config(env["CONFIG"]).is_file()

    # Its command, on two nodes of one process, for longer than the test lasts.
    values = yaml.safe_load(config.read_text())
    values["optim"]["epochs"], values["run"]["save_every"] = 100_000, 2
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    env |= {"NODES": "2", "GPUS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    env |= {"CONFIG": str(tmp_path / "config.yaml"), "RUN_DIR": str(tmp_path / "run")}
    env["VIDEOS"] = str(config.parent)
    pods = [
        subprocess.Popen(
            [*container["command"], *container["args"]], cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=environment(**env, JOB_COMPLETION_INDEX=str(index)),
        )
        for index in range(2)
    ]  # fmt: skip
    try:
        lines = []
        for line in pods[0].stdout:
            lines.append(line)
            if "| step 5/" in line:
                break
        assert pods[0].poll() is None, "".join(lines)
        killed = time.perf_counter()
        end_node(pods[1])
        rest, _ = pods[0].communicate(timeout=60)
        seconds = time.perf_counter() - killed
    finally:
        for pod in pods:
            end_node(pod)
            pod.wait()
    assert pods[0].returncode == 1 and seconds < 30, rest
    assert "Traceback" not in rest.split("torch/distributed/elastic")[0]
    assert rest.count("has died or is stuck") == 1 and "run.resume=auto" in rest
    tag = (tmp_path / "run" / "state" / "latest").read_text().strip()
    assert (tmp_path / "run" / "state" / tag / "record.json").is_file()
    assert VideoViT.from_pretrained(tmp_path / "run" / "last").config.num_classes == 2


def test_no_group_of_processes_waits_longer_for_a_stuck_one_than_told(monkeypatch):
    monkeypatch.setenv("DEEPSPEED_TIMEOUT", "3")
    start_processes()
    try:
        model = build(small_config()).freeze()
        engine = build_engine(model, OptimConfig(batch_size=2, micro_batch=2), steps_per_epoch=4)
        groups = [
            group._get_backend(torch.device("cpu")) for group in distributed_c10d._world.pg_map
        ]
        assert len(groups) > 1  # the world, and those of DeepSpeed
        assert {group.options._timeout for group in groups} == {timedelta(minutes=3)}
        engine.destroy()
    finally:
        end_processes()


def test_hostfile_command_starts_a_node_of_two(config, tmp_path, port):
    hosts = snippet("hostfile").replace("node-a slots=8", "127.0.0.1 slots=1")
    (tmp_path / "hosts.txt").write_text(hosts.replace("node-b slots=8", "localhost slots=1"))
    command = snippet("hostfile-command").replace("hosts.txt", str(tmp_path / "hosts.txt"))
    nodes = [
        subprocess.Popen(
            ["bash", "-c", command, "train", "--config", str(config),
             f"run.dir={tmp_path / 'run'}", "run.max_steps=1", "data.val_list=null"],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=environment(NODE=str(number), MASTER_ADDR="127.0.0.1", MASTER_PORT=port),
        )
        for number in range(2)
    ]  # fmt: skip
    try:
        texts = [node.communicate(timeout=240)[0] for node in nodes]
    finally:
        for node in nodes:
            end_node(node)
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(texts)
    assert "".join(texts).count('"steps": 1') == 1
    assert "2 x 2 processes" in "".join(texts)
