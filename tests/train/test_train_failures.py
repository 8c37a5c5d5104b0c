"""Whatever ends a run ends it soon, in one line; the cause gone, the run goes on exactly."""

import json
import os
import pickle
import socket
import subprocess
from enum import Enum
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training import (
    MODEL,
    Ranks,
    arguments,
    assert_same_run,
    make_data,
    wait_for,
)

from zeroi2v import VideoViT
from zeroi2v.config import ModelConfig
from zeroi2v.data.pipeline import ClipLoader
from zeroi2v.train.divergence import first_bad, watch
from zeroi2v.train.log import read_log
from zeroi2v.train.main import check_weights, main
from zeroi2v.train.state import StateFiles, _without_enums, lock_folder

RUN = ("optim.epochs=3", "optim.micro_batch=1", "run.save_every=1", "run.resume=auto",
       "optim.zero_stage=3")  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """What two processes reach that nothing stops."""
    folder = tmp_path_factory.mktemp("whole")
    with Ranks(arguments(data, folder / "run", *RUN), count=2, output=folder / "text") as ranks:
        assert ranks.wait(200) == [0, 0], ranks.text()
    return folder / "run"


def ends_in_one_line(ranks: Ranks) -> str:
    """The line."""
    codes = ranks.wait(60)
    assert codes == [1, 1], ranks.text()
    (line,) = ranks.errors()
    return line


def goes_on(data: Path, run_dir: Path, whole: Path) -> None:
    words = arguments(data, run_dir, *RUN)
    with Ranks(words, count=2, output=run_dir.parent / "again.txt") as ranks:
        assert ranks.wait(200) == [0, 0], ranks.text()
    assert_same_run(whole, run_dir)


def poison() -> None:
    """Video 5 has a pixel that is not a number, from the second epoch on."""
    make_batch = ClipLoader._batch

    def poisoned(self, epoch, *rest):
        batch = make_batch(self, epoch, *rest)
        if epoch > 0:
            batch.video[batch.index == 5, ..., 0, 0] = float("nan")
        return batch

    ClipLoader._batch = poisoned


def test_nan_in_a_clip_is_told_with_step_file_and_layer_and_kept(data, whole, tmp_path):
    run_dir = tmp_path / "run"
    words = arguments(data, run_dir, *RUN)
    with Ranks(words, count=2, output=tmp_path / "text", before=poison) as ranks:
        line = ends_in_one_line(ranks)
    step = read_log(run_dir)[-1]["step"] + 1
    assert f"loss must be finite: got nan at step {step}, from {data}/5.mp4; " in line
    assert "first bad layer: none, the pixels themselves are not finite" in line
    kept = run_dir / "diverged"
    report = json.loads((kept / "report.json").read_text())
    bad = [clip for clip in report["clips"] if not clip["pixels_finite"]]
    assert [clip["file"] for clip in bad] == [f"{data}/5.mp4"] and report["step"] == step
    clips = load_file(kept / "clips.safetensors")
    assert clips["video"].isnan().any() and clips["label"].tolist() == [1]
    model = VideoViT.from_pretrained(kept / "model")
    assert all(p.isfinite().all() for p in model.parameters())
    assert model(clips["video"]).isnan().any()
    goes_on(data, run_dir, whole)


def test_first_bad_layer_is_the_one_where_the_numbers_went_wrong():
    torch.manual_seed(0)
    model = VideoViT(ModelConfig.from_dict(MODEL)).freeze()
    video = torch.randn(2, 3, 4, 32, 32)
    layers = watch(model, video)[1]
    assert "the largest value" in first_bad(layers, True)
    with torch.no_grad():
        model.transformer.resblocks[1].mlp.c_fc.weight[3, 3] = float("inf")
    logits, layers = watch(model, video)
    assert not logits.isfinite().all()
    assert first_bad(layers, True) == "transformer.resblocks.1.mlp.c_fc"
    with torch.no_grad():
        model.conv1.weight[0] = float("nan")
    assert first_bad(watch(model, video)[1], True) == "conv1"
    assert not any(module._forward_hooks for module in model.modules())


def test_weights_that_are_not_finite_are_not_saved():
    check_weights({"a": torch.ones(2)}, 3)
    with pytest.raises(ValueError, match="trained weights must be finite: b is not after step 3"):
        check_weights({"a": torch.ones(2), "b": torch.tensor([1.0, float("inf")])}, 3)


def test_full_disk_is_told_and_the_state_before_it_is_kept(data, whole, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a tmpfs")
    try:
        words = arguments(data, disk / "run", *RUN)
        with Ranks(words, count=2, output=tmp_path / "text") as ranks:
            wait_for(lambda: len(read_log(disk / "run")) >= 3, 200)
            free = os.statvfs(disk)
            (disk / "filler").write_bytes(bytes(max(0, free.f_bavail * free.f_bsize - 100_000)))
            line = ends_in_one_line(ranks)
        assert "can't be written" in line or "No space left on device" in line
        (disk / "filler").unlink()
        goes_on(data, disk / "run", whole)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_vanished_videos_are_told_and_the_run_goes_on_when_they_are_back(data, whole, tmp_path):
    run_dir, away = tmp_path / "run", data.with_name("away")
    with Ranks(arguments(data, run_dir, *RUN), count=2, output=tmp_path / "text") as ranks:
        wait_for(lambda: len(read_log(run_dir)) >= 3, 200)
        data.rename(away)
        try:
            line = ends_in_one_line(ranks)
        finally:
            away.rename(data)
    assert f"data.root must contain the videos: {data} is empty or gone" in line
    goes_on(data, run_dir, whole)


def test_taken_port_is_told_by_name_and_the_run_starts_when_it_is_free(data, tmp_path):
    words = arguments(data, tmp_path / "run", "run.max_steps=1", "data.val_list=null")
    ranks = Ranks(words, count=2, output=tmp_path / "taken")
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as those that come after
        holder.bind(("", ranks.ports[0]))
        holder.listen()
        with ranks:
            first = ranks.processes[0]  # the other waits, and would be ended by a launcher
            wait_for(lambda: first.exitcode is not None, 60)
            assert first.exitcode == 1
            (line,) = ranks.errors()
    assert f"MASTER_PORT must be free: 127.0.0.1:{ranks.ports[0]} is taken" in line
    assert not (tmp_path / "run").exists()
    with Ranks(words, count=2, output=tmp_path / "free") as ranks:
        assert ranks.wait(60) == [0, 0], ranks.text()
    assert [line["step"] for line in read_log(tmp_path / "run")] == [1]


def test_run_folder_takes_one_run_at_a_time(data, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    folder.mkdir()
    monkeypatch.setattr(lock_folder, "__defaults__", (0.1,))
    lock = lock_folder(folder)
    with pytest.raises(OSError, match=f"another run is writing to {folder}"):
        main(arguments(data, folder))
    lock.release()
    lock_folder(folder).release()


def test_auto_begins_where_there_is_no_state_and_never_over_a_model(data, tmp_path, capsys):
    auto = ("run.resume=auto", "data.val_list=null")
    run_dir = tmp_path / "run"
    (run_dir / "state" / "step_00000001_validated_00000000").mkdir(parents=True)
    (run_dir / "config.yaml").write_text("cut sho")
    (run_dir / "log.jsonl").write_text('{"step": 1, "epoch": 0.25, "loss": 1}\n{"step": 2, "ep')
    (run_dir / ".last-x").mkdir()
    main(arguments(data, run_dir, *auto, "run.max_steps=1"))
    assert [line["step"] for line in read_log(run_dir)] == [1]
    assert not (run_dir / ".last-x").exists()
    assert len(list((run_dir / "state").glob("step_*"))) == 1
    main(arguments(data, run_dir, *auto, "run.max_steps=2"))
    assert "resumed     after step 1" in capsys.readouterr().out
    assert [line["step"] for line in read_log(run_dir)] == [1, 2]
    (run_dir / "state" / "latest").unlink()
    (run_dir / "best").mkdir()
    with pytest.raises(ValueError, match="run.resume=auto needs the state of a run that has one"):
        main(arguments(data, run_dir, *auto))


class Harm:
    def __reduce__(self):
        return os.system, ("touch harmed",)


def test_state_that_is_damaged_or_executes_something_is_refused(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_dir = tmp_path / "run"
    main(arguments(data, run_dir, "run.max_steps=1", "data.val_list=null"))
    again = arguments(data, run_dir, "run.resume=true", "data.val_list=null")
    (file,) = (run_dir / "state").rglob("*optim_states.pt")
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="state file can't be read: .*optim_states.pt"):
        main(again)
    torch.save({"optimizer_state_dict": Harm()}, file)
    with pytest.raises(ValueError, match="state file can't be read: .*optim_states.pt"):
        main(again)
    file.write_bytes(pickle.dumps(Harm()))
    with pytest.raises(ValueError, match="state file can't be read"):
        StateFiles().load(str(file))
    assert not (tmp_path / "harmed").exists()
    file.write_bytes(content)
    main([*again, "run.max_steps=2"])


def test_states_hold_no_enums_which_some_pythons_pickle_by_calls():
    class Stage(int, Enum):
        one = 1

    kept = _without_enums({"zero_stage": Stage.one, "inner": {"b": Stage.one}})
    assert type(kept["zero_stage"]) is int and kept["zero_stage"] == 1
    assert type(kept["inner"]["b"]) is int
