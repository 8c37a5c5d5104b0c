"""A run that is killed at random goes on by itself to the very weights of one that never was.

`ZEROI2V_SOAK=20` makes it 20 stops in each ZeRO stage, which takes many minutes.
"""

import os
import random
import signal
import time
from pathlib import Path

import psutil
import pytest
from training import (
    MODEL,
    Ranks,
    arguments,
    assert_same_run,
    make_data,
    save_for_ever,
    server,
    wait_for,
)

from zeroi2v import VideoViT
from zeroi2v.config import ModelConfig
from zeroi2v.train.log import read_log
from zeroi2v.train.state import clear_leftovers

STOPS = int(os.environ.get("ZEROI2V_SOAK", "4"))
STAGES = range(4) if "ZEROI2V_SOAK" in os.environ else (2,)
ALL, ONE = [0, 1], [1]
# Signal and ranks it goes to, in turn.
ACTIONS = [(signal.SIGKILL, ALL), (signal.SIGKILL, ONE), (signal.SIGTERM, ONE),
           (signal.SIGKILL, [0]), (signal.SIGTERM, ALL)]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("stage", STAGES)
def test_run_stopped_at_random_is_bit_equal_to_one_never_stopped(data, tmp_path, stage):
    """Two processes, each with a decoding worker; nothing is told to a new start but `auto`."""
    epochs = STOPS  # of 4 steps
    options = (
        f"optim.zero_stage={stage}", f"optim.epochs={epochs}", "optim.clip_grad=1",
        "optim.micro_batch=1", "data.workers=1", "run.save_every=1", "run.resume=auto",
    )  # fmt: skip
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    with Ranks(arguments(data, whole, *options), count=2, output=tmp_path / "whole.txt") as ranks:
        assert ranks.wait(900) == [0, 0], ranks.text()

    rng = random.Random(stage)
    for stop in range(STOPS):
        number, target = ACTIONS[stop % len(ACTIONS)]
        output = tmp_path / f"{stop}.txt"
        with Ranks(arguments(data, broken, *options), count=2, output=output) as ranks:
            goal = rng.randint(1, 2)  # steps of this start
            wait_for(lambda g=goal: ranks.text().count("| step ") >= g or done(ranks), 300)
            time.sleep(rng.random() * 0.4)
            workers = [w for p in ranks.processes if p.is_alive()
                       for w in psutil.Process(p.pid).children()]  # fmt: skip
            assert not done(ranks), ranks.text()
            ranks.send(number, target)
            codes = ranks.wait(60)
        if number == signal.SIGTERM:
            assert codes == [128 + signal.SIGTERM] * 2, ranks.text()
        else:
            assert all(codes[rank] == -signal.SIGKILL for rank in target)
            if target is not ALL:
                told = ranks.errors()
                assert len(told) == 1 and "run.resume=auto" in told[0], ranks.text()
        wait_for(lambda workers=workers: not any(w.is_running() for w in workers), 10)
    with Ranks(arguments(data, broken, *options), count=2, output=tmp_path / "end.txt") as ranks:
        assert ranks.wait(900) == [0, 0], ranks.text()
    assert_same_run(whole, broken)
    steps = [line["step"] for line in read_log(broken) if "loss" in line]
    assert steps == list(range(1, 4 * epochs + 1))
    names = {p.name for p in broken.iterdir()}
    assert not [n for n in names if n.startswith((".last", ".best", ".log"))], names


def done(ranks: Ranks) -> bool:
    return not all(process.is_alive() for process in ranks.processes)


def test_kill_in_the_middle_of_saving_over_a_model_leaves_one_of_the_two_whole(tmp_path):
    folder, rng = tmp_path / "last", random.Random(0)
    VideoViT(ModelConfig.from_dict(MODEL)).save_pretrained(folder)
    for _ in range(12):
        child = server().Process(target=save_for_ever, args=(folder, (3, 5)))
        before = folder.stat().st_ino
        child.start()
        wait_for(lambda before=before: folder.stat().st_ino != before, 60)
        time.sleep(0.05 * rng.random())
        child.kill()
        child.join()
        model = VideoViT.from_pretrained(folder)  # strict: config and tensors are of one model
        assert model.head.out_features == model.config.num_classes
    assert model.config.num_classes in (3, 5)
    clear_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["last"]
