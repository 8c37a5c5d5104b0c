"""The cache of the first blocks' tokens: the same bits as without it, never another run's."""

import gc
import os
import re
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models import build
from training import MODEL, Ranks, arguments, assert_same_run, make_data

import zeroi2v.train.fill
import zeroi2v.train.main
from zeroi2v.cli import run
from zeroi2v.config import ModelConfig
from zeroi2v.data.pipeline import ClipLoader
from zeroi2v.processes import end_processes
from zeroi2v.train.config import load_config
from zeroi2v.train.distributed import StopSignals, start_processes
from zeroi2v.train.prepare import prepare

WITHOUT = ("model.adapt_from=1", "augment=null", "data.clips_per_video=2", "optim.epochs=3",
           "data.max_bad_fraction=0.1")  # fmt: skip
BAD = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """16 videos to train on, one of them damaged."""
    folder = make_data(tmp_path_factory.mktemp("data"))
    (folder / f"{BAD}.mp4").write_bytes(b"no video")
    return folder


@pytest.fixture
def go(data, tmp_path, monkeypatch):
    """Runs main in this process; `name` is the run folder's."""
    gc.freeze()
    monkeypatch.setattr(zeroi2v.train.main, "write_report", lambda folder: None)

    def go(name: str, *overrides: str) -> Path:
        zeroi2v.train.main.main(arguments(data, tmp_path / name, *WITHOUT, *overrides))
        return tmp_path / name

    return go


def files(cache: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in cache.rglob("*.tokens")}


def test_a_run_with_the_cache_is_bit_equal_to_one_without_stopped_or_not(
    go, tmp_path, monkeypatch, capsys
):
    cache = f"data.cache_tokens={tmp_path / 'cache'}"
    plain, cached = go("plain"), go("cached", cache)
    output = capsys.readouterr().out
    assert_same_run(plain, cached)
    assert (plain / "bad_files.txt").read_text() == (cached / "bad_files.txt").read_text()
    assert "tokens      32 clips of 2.56 kB in" in output
    made = files(tmp_path / "cache")
    assert len(made) == 2 * 15 and len(list((tmp_path / "cache").iterdir())) == 1

    asked = []
    of = ClipLoader.of
    monkeypatch.setattr(ClipLoader, "of", lambda loader, clips: asked.append(clips.tolist())
                        or of(loader, clips))  # fmt: skip
    go("again", cache, "run.max_steps=5")
    go("again", cache, "run.resume=true")
    assert_same_run(plain, tmp_path / "again")
    assert files(tmp_path / "cache") == made
    assert asked == [[[0, BAD], [1, BAD]]] * 2  # what can't be decoded is tried again, as ever


def test_processes_share_the_cache_and_change_no_bit(data, tmp_path):
    """With another number of clips at once, a decoding worker for each, and sharded weights."""
    options = ("optim.micro_batch=1", "data.workers=1", "optim.zero_stage=3", "optim.batch_size=8",
               "optim.epochs=2", "data.clips_per_video=1")  # fmt: skip
    cache = f"data.cache_tokens={tmp_path / 'cache'}"
    words = [
        arguments(data, tmp_path / name, *WITHOUT, *options, *more)
        for name, more in (("plain", []), ("cached", [cache]))
    ]
    with Ranks(*words, count=2, output=tmp_path / "out.txt") as ranks:
        assert ranks.wait(600) == [0, 0], ranks.text()
    assert_same_run(tmp_path / "plain", tmp_path / "cached")
    assert len(files(tmp_path / "cache")) == 15


@pytest.fixture
def job(data, tmp_path):
    """Prepares a run with the cache, without starting it."""
    device = start_processes()

    def job(*overrides: str):
        cache = f"data.cache_tokens={tmp_path / 'cache'}"
        words = arguments(data, tmp_path / "run", *WITHOUT, cache, *overrides)
        return prepare(load_config(words[1], words[2:]), device, None)

    yield job
    end_processes()


def test_files_are_of_one_model_one_preprocessing_and_one_video(job, data, tmp_path):
    image = ModelConfig.from_dict({**MODEL, "adapter": None})
    build(image).save_pretrained(tmp_path / "image")
    job = partial(job, f"model.backbone={tmp_path / 'image'}")
    first = job().tokens
    for same in ("model.adapter.ratio=0.5", "model.head_offsets=[0,1]", "optim.epochs=1"):
        again = job(same).tokens.files
        assert len(again) == (16 if same == "optim.epochs=1" else 32)
        assert again.items() <= first.files.items()
    build(image, seed=1).save_pretrained(tmp_path / "other")
    others = (
        f"model.backbone={tmp_path / 'other'}",
        "model.preprocess.val_short_side=40",
        "optim.micro_batch=1",
        "optim.precision=bf16",
        "model.preprocess.sampling=dense",
        "model.num_frames=2",
    )
    folders = {job(other).tokens.cache.folder for other in others} | {first.cache.folder}
    assert len(folders) == 1 + len(others)
    drawn = job("run.seed=1").tokens
    assert not {f.name for f in drawn.files.values()} & {f.name for f in first.files.values()}
    video = data / "5.mp4"
    os.utime(video, ns=(1, 1))
    changed = job().tokens.files
    assert {clip for clip in changed if changed[clip] != first.files[clip]} == {(0, 5), (1, 5)}


def test_a_damaged_file_is_made_again_or_named(job, tmp_path):
    ready = job()
    with StopSignals() as signals:
        assert zeroi2v.train.fill.fill(ready, signals) == 0
        tokens = ready.tokens
        file = tokens.files[0, 0]
        whole = file.read_bytes()
        file.write_bytes(whole[:-1])  # of another size: not there
        assert (0, 0) in tokens.missing()
        assert zeroi2v.train.fill.fill(job(), signals) == 0
        assert file.read_bytes() == whole
    file.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(ValueError, match=rf"data.cache_tokens: {file} is damaged: delete it"):
        list(tokens.epoch())
    file.unlink()
    with pytest.raises(ValueError, match=rf"one folder for all processes.*{file} and 0 others"):
        tokens.check()
    assert not list(tokens.cache.folder.glob(".*"))  # nothing temporary is left


def test_a_device_that_rounds_by_place_and_a_full_disk_are_refused(job, monkeypatch, tmp_path):
    monkeypatch.setattr(
        zeroi2v.train.fill.VideoViT, "image_tokens",
        lambda self, video: torch.arange(len(video)).view(-1, 1, 1, 1).expand(-1, 4, 5, 32).float(),
    )  # fmt: skip
    with StopSignals() as signals, pytest.raises(ValueError, match="needs optim.micro_batch=1 on"):
        zeroi2v.train.fill.fill(job(), signals)
    full = SimpleNamespace(free=1000, total=10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(
        ValueError, match=r"data.cache_tokens needs 82.05 kB more, and 1.00 kB is free"
    ):
        job()


def test_a_signal_ends_the_filling(job, tmp_path):
    with StopSignals() as signals:
        signals.received = 15
        assert zeroi2v.train.fill.fill(job(), signals) == 143
    assert len(files(tmp_path / "cache")) == 2  # of the batch that was begun


def test_a_dry_run_tells_space_and_time_and_writes_nothing(data, tmp_path, capsys):
    cache = tmp_path / "cache"
    words = arguments(data, tmp_path / "run", *WITHOUT, f"data.cache_tokens={cache}")
    zeroi2v.train.main.main([*words, "--dry-run"])
    output = capsys.readouterr().out
    told = r"tokens      32 clips of 2.56 kB in .*: 82.05 kB, 0.00 kB of it there; [\d,.]+ [MG]B is"
    assert re.search(told, output)
    assert re.search(r"tokens      computed in about 0:00:\d\d, before the first step", output)
    assert "verdict     fits" in output and not cache.exists()


@pytest.mark.parametrize(
    "override, need",
    [
        ("augment={flip: 0.5}", "augment=null: what is changed at random never comes again"),
        ("model.adapt_from=0", "model.adapt_from above 0: no block before 0 is frozen"),
        ("data.clips_per_video=null", "data.clips_per_video: else each epoch has other frames"),
    ],
)
def test_what_can_not_be_kept_is_one_line(data, tmp_path, capsys, override, need):
    words = arguments(data, tmp_path / "run", *WITHOUT, "data.cache_tokens=x", override)
    assert run(zeroi2v.train.main.main, words) == 1
    assert capsys.readouterr().err == f"error: data.cache_tokens needs {need}\n"


def test_epochs_take_the_clips_of_a_video_in_turn(data):
    config = load_config(data / "config.yaml", ["run.dir=x", "augment=null"])
    samples = [SimpleNamespace(path=str(data / f"{i}.mp4"), label=i, name=str(i), start=None,
                               end=None, span=None, filename_tmpl=None, frames=None)
               for i in range(4)]  # fmt: skip

    def clips(epoch: int, count: int | None) -> dict[int, torch.Tensor]:
        loader = ClipLoader(samples[:3], config.model.video, batch_size=3, clips=count, seed=1)
        (batch,) = loader.epoch(epoch)
        return dict(zip(batch.index.tolist(), batch.video, strict=True))

    first, second, third, free = clips(0, 2), clips(1, 2), clips(2, 2), clips(2, None)
    for i in range(3):
        assert torch.equal(first[i], third[i])
    assert any(not torch.equal(first[i], second[i]) for i in range(3))
    assert any(not torch.equal(first[i], free[i]) for i in range(3))
    for i, clip in clips(1, None).items():  # a draw is that of the epoch of its number
        assert torch.equal(clip, second[i])
    assert np.array_equal(sorted(first), [0, 1, 2])
