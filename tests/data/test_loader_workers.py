"""Workers of a loader: what they import, and how they end, die and are replaced."""

import dataclasses
import multiprocessing
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from multiprocessing import connection
from pathlib import Path

import loading
import pytest
import torch
from deadly import DeadlySource
from loading import AUGMENT, assert_same, config

from zeroi2v.data import pipeline
from zeroi2v.data.annotations import Sample
from zeroi2v.data.pipeline import ClipLoader


def test_a_program_with_workers_is_run_once_and_ends_though_its_epoch_does_not(samples, tmp_path):
    script = tmp_path / "program.py"
    script.write_text(
        textwrap.dedent(f"""
        from zeroi2v.config import ModelConfig
        from zeroi2v.data.annotations import Sample
        from zeroi2v.data.pipeline import ClipLoader
        samples = [Sample({samples[0].path!r}, 0)] * 20
        config = ModelConfig(image_size=32, num_frames=2)
        loader = ClipLoader(samples, config, batch_size=2, workers=2)
        batches = loader.epoch()
        print(tuple(next(batches).video.shape))
        """)
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "(2, 1, 3, 2, 32, 32)"


def test_workers_import_neither_torch_nor_more_than_they_need():
    code = "import sys, zeroi2v.data.clip_worker; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.skipif(sys.platform != "linux", reason="relies on Linux's parent death signal")
def test_workers_do_not_outlive_a_killed_process(samples):
    code = f"""
        import multiprocessing, os, signal
        from loading import config
        from zeroi2v.data.pipeline import ClipLoader, Sample
        loader = ClipLoader([Sample({samples[0].path!r}, 0)] * 8, config(), batch_size=2, workers=2)
        next(loader.epoch())
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        cwd=Path(loading.__file__).parent,
    )
    pids = [int(pid) for pid in result.stdout.split()]
    assert result.returncode == -9 and len(pids) == 2
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize("how", ["deadly", "endless"])
def test_a_file_that_kills_or_hangs_its_worker_is_named_and_replaced(
    samples, tmp_path, monkeypatch, how
):
    path = str(shutil.copy(samples[3].path, tmp_path / f"{how}.mp4"))
    mixed = [*samples[:3], Sample(path, 3), *samples[4:]]
    monkeypatch.setattr(pipeline, "ClipSource", DeadlySource)
    common = dict(batch_size=2, augment=AUGMENT, seed=4, timeout=1.5)
    loader = ClipLoader(mixed, config(), workers=2, **common)
    batches = list(loader.epoch(0)) + list(loader.epoch(1))
    index = torch.cat([batch.index for batch in batches])
    assert len(batches) == 12 and 3 not in index
    verb = {"deadly": "crashes", "endless": "hangs"}[how]
    assert loader.bad_files == {path: f"{path}: {verb} the decoder"}
    # Known to be bad, it is replaced as any bad file is.
    want = ClipLoader(mixed, config(), **common)
    want.plan = dataclasses.replace(want.plan, fatal=loader.bad_files)
    assert_same(batches, [*want.epoch(0), *want.epoch(1)])


@pytest.mark.usefixtures("forked_workers")
def test_workers_that_are_killed_for_no_fault_of_a_file_are_replaced_once_a_batch(samples):
    plain = list(ClipLoader(samples, config(), batch_size=2, augment=AUGMENT).epoch())
    loader = ClipLoader(samples, config(), batch_size=2, augment=AUGMENT, workers=2)
    before, got = set(multiprocessing.active_children()), []
    for batch in loader.epoch():
        got.append(batch)
        if len(got) in (1, 3):
            victims = sorted(set(multiprocessing.active_children()) - before, key=id)
            for child in victims[: len(got)]:
                child.kill()
                child.join()
    assert_same(got, plain)
    assert loader.bad_files == {}
    batches = loader.epoch()
    next(batches)
    build = loader._build

    def broken(*args):
        pipeline = build(*args)
        for child in loader._children:
            child.kill()
            child.join()
        return pipeline

    loader._build = broken
    for child in loader._children:
        child.kill()
        child.join()
    with pytest.raises(RuntimeError, match="a decoding process was killed"):
        list(batches)


def test_a_worker_that_dies_is_seen_while_another_thread_reaps_it(samples, monkeypatch):
    """Until that is done, multiprocessing takes it to be alive, and DALI would wait for ever."""
    waitpid = os.waitpid

    def slow(*args):
        result = waitpid(*args)
        if result[0] and threading.current_thread() is not threading.main_thread():
            time.sleep(1)
        return result

    plain = list(ClipLoader(samples, config(), batch_size=2, augment=AUGMENT).epoch())
    loader = ClipLoader(samples, config(), batch_size=2, augment=AUGMENT, workers=2)
    got = []
    for batch in loader.epoch():
        got.append(batch)
        if len(got) == 1:
            monkeypatch.setattr(os, "waitpid", slow)
            child = loader._children[0]
            child.kill()
            connection.wait([child.sentinel])
            time.sleep(0.1)
            assert child.is_alive()  # as it seems
    assert_same(got, plain)
