"""Clips as a training run gets them: order, preprocessing, bad files, cache, arguments."""

import dataclasses
import gc
import multiprocessing
import os
import resource
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from loading import AUGMENT, assert_same, config, pixels
from videos import (
    numbered_frame,
    read_number,
    write_numbered,
)

from zeroi2v.data import frame_cache
from zeroi2v.data.annotations import Sample
from zeroi2v.data.clip_worker import ClipSource
from zeroi2v.data.graph import clip_graph
from zeroi2v.data.nvdec import Capability
from zeroi2v.data.packets import DecodeError
from zeroi2v.data.pipeline import AugmentConfig, ClipLoader, check_bad_files

pytestmark = pytest.mark.usefixtures("forked_workers")

# Order


def test_an_epoch_visits_samples_once_in_an_order_of_seed_and_epoch(samples):
    loader = ClipLoader(samples, config(), batch_size=3, seed=5)
    assert loader.steps_per_epoch == 4
    orders = [torch.cat([b.index for b in loader.epoch(e)]).tolist() for e in (0, 1, 0)]
    assert len(set(orders[0])) == 12 and orders[0] == orders[2] != orders[1]
    other = ClipLoader(samples, config(), batch_size=3, seed=6)
    assert torch.cat([b.index for b in other.epoch(0)]).tolist() != orders[0]
    for batch in loader.epoch(3):
        assert batch.video.shape == (3, 1, 3, 4, 32, 32) and batch.video.dtype == torch.float32
        assert batch.label.dtype == batch.index.dtype == torch.int64
        assert batch.label.tolist() == [samples[i].label for i in batch.index]


def test_clips_do_not_depend_on_the_number_of_processes(bad_samples):
    def rows(batch_size, world_size, accumulation):
        loaders = [
            ClipLoader(
                bad_samples,
                config(),
                batch_size=batch_size,
                rank=rank,
                world_size=world_size,
                accumulation=accumulation,
                augment=AUGMENT,
                seed=3,
            )
            for rank in range(world_size)
        ]
        assert all(loader.steps_per_epoch == 3 for loader in loaders)
        per_rank = [list(loader.epoch(2)) for loader in loaders]
        # Micro-batch by micro-batch, rank by rank: the order of the global batch.
        return [batch for batches in zip(*per_rank, strict=True) for batch in batches]

    whole = rows(4, 1, 1)
    for split in (rows(2, 2, 1), rows(2, 1, 2), rows(1, 2, 2)):
        assert torch.equal(torch.cat([b.index for b in split]), torch.cat([b.index for b in whole]))
        assert torch.equal(torch.cat([b.label for b in split]), torch.cat([b.label for b in whole]))
        assert torch.equal(torch.cat([b.video for b in split]), torch.cat([b.video for b in whole]))


def test_two_shards_of_three_workers_see_each_clip_once_and_resume_at_any_size(samples):
    def rows(batch_size, world_size, workers, epoch, start_step=0):
        loaders = [
            ClipLoader(
                samples * 2,
                config(),
                batch_size=batch_size,
                rank=rank,
                world_size=world_size,
                workers=workers,
                augment=AUGMENT,
                seed=8,
            )
            for rank in range(world_size)
        ]
        per_rank = [list(loader.epoch(epoch, start_step)) for loader in loaders]
        return [batch for batches in zip(*per_rank, strict=True) for batch in batches]

    whole = rows(1, 2, 3, epoch=1)
    order = torch.cat([batch.index for batch in whole]).tolist()
    assert sorted(order) == list(range(26)) and order != sorted(order)
    other = torch.cat([batch.index for batch in rows(1, 2, 3, epoch=2)]).tolist()
    assert sorted(other) == list(range(26)) and other != order
    assert_same(rows(1, 2, 3, epoch=1, start_step=5), whole[10:])
    alone = rows(2, 1, 3, epoch=1, start_step=5)
    for name in ("index", "label", "video"):
        ours, theirs = (torch.cat([getattr(b, name) for b in x]) for x in (alone, whole[10:]))
        assert torch.equal(ours, theirs), name


def test_resuming_gives_the_batches_of_the_whole_epoch_and_decodes_only_those(
    bad_samples, monkeypatch
):
    def loader():
        return ClipLoader(
            bad_samples, config(), batch_size=2, accumulation=2, augment=AUGMENT, seed=1
        )

    whole = list(loader().epoch(4))
    assert len(whole) == 6
    decoded = []
    read = frame_cache.read_frames
    monkeypatch.setattr(frame_cache, "read_frames", lambda *a: decoded.append(a[0]) or read(*a))
    assert_same(loader().epoch(4, start_step=2), whole[4:])
    replaced = [path for path in decoded if "bad" in path]
    assert len(decoded) == 4 + len(replaced)
    assert list(loader().epoch(4, start_step=3)) == []


def test_workers_give_the_clips_of_one_process_and_live_on_between_epochs(bad_samples):
    alone = ClipLoader(bad_samples, config(), batch_size=3, augment=AUGMENT)
    loader = ClipLoader(bad_samples, config(), batch_size=3, augment=AUGMENT, workers=2)
    before = {child.pid for child in multiprocessing.active_children()}
    workers = []
    for epoch, start_step in ((1, 2), (2, 0), (3, 0)):
        assert_same(loader.epoch(epoch, start_step), alone.epoch(epoch, start_step))
        workers.append({c.pid for c in multiprocessing.active_children()} - before)
    assert loader.bad_files == alone.bad_files and loader.bad_files
    assert len(workers[0]) == 2 and workers[0] == workers[1] == workers[2]
    del loader
    gc.collect()
    assert not workers[0] & {child.pid for child in multiprocessing.active_children()}


def test_an_epoch_left_early_can_be_begun_again(samples):
    loader = ClipLoader(samples, config(), batch_size=2, augment=AUGMENT)
    whole = list(loader.epoch(0))
    for _ in loader.epoch(0):
        break
    assert_same(loader.epoch(0), whole)


def test_an_epoch_ends_when_another_is_begun(samples):
    loader = ClipLoader(samples, config(), batch_size=2)
    first, second = loader.epoch(0), loader.epoch(1)
    next(first)
    next(second)
    with pytest.raises(RuntimeError, match="this epoch ended when another one was begun"):
        next(first)
    assert len(list(second)) == 5


def test_a_batch_keeps_its_values_while_later_ones_are_made(samples):
    loader = ClipLoader(samples, config(), batch_size=2)
    copies = [(b, b.video.clone()) for b in loader.epoch(0)]
    assert all(torch.equal(batch.video, copy) for batch, copy in copies)
    assert len({batch.video.data_ptr() for batch, _ in copies}) == len(copies)


# Frames and preprocessing


def test_training_frames_are_those_of_the_published_sampling(tmp_path):
    path = write_numbered(tmp_path / "v.mp4", 60, size=(64, 64))
    for process in (dict(sampling="uniform"), dict(sampling="dense", interval=4)):
        cfg = config(64, 8, val_short_side=64, **process)
        loader = ClipLoader([Sample(path, 0)] * 4, cfg, batch_size=4, seed=9)
        clips = []
        for epoch in range(4):
            video = next(iter(loader.epoch(epoch))).video[:, 0]
            clips += [[read_number(f) for f in c] for c in pixels(video, cfg.preprocess)]
        assert len({tuple(c) for c in clips}) > 8
        for clip in clips:
            if cfg.preprocess.sampling == "dense":
                assert np.diff(clip).tolist() == [4] * 7 and clip[0] <= 60 - 32
            else:
                segment = 59 / 8
                for i, frame in enumerate(clip):
                    assert round(segment * i) <= frame <= round(segment * (i + 1))


# Bad files


def test_bad_training_files_are_replaced_named_and_counted(bad_samples):
    loaders = [ClipLoader(bad_samples, config(), batch_size=13, augment=AUGMENT) for _ in range(2)]
    (batch,), (again,) = (list(loader.epoch(0)) for loader in loaders)
    assert_same([batch], [again])
    index = batch.index.tolist()
    assert not {2, 7, 11} & set(index) and min(index) >= 0
    assert len(set(index)) <= 10  # ten good ones, and three of them once more
    assert batch.label.tolist() == [bad_samples[i].label for i in index]
    assert set(loaders[0].bad_files) == {bad_samples[i].path for i in (2, 7, 11)}
    for path, reason in loaders[0].bad_files.items():
        assert reason.startswith(f"{path}: ")


def test_training_on_bad_files_alone_stops_with_the_reason(bad_samples):
    loader = ClipLoader([bad_samples[2]] * 2, config(), batch_size=2)
    with pytest.raises(ValueError, match=r"samples must contain videos that decode: .*bad2\.mp4: "):
        list(loader.epoch())


def test_the_cache_gives_the_same_batches_without_decoding_again(
    bad_samples, tmp_path, monkeypatch
):
    part = dataclasses.replace(bad_samples[0], start=0.1, end=0.3)
    common = dict(batch_size=2, augment=AugmentConfig(rand_augment_ops=0), seed=1)
    plain = ClipLoader([*bad_samples, part], config(), **common)
    cached = ClipLoader([*bad_samples, part], config(), cache=str(tmp_path), **common)
    for epoch in (0, 1, 2):
        assert_same(cached.epoch(epoch), plain.epoch(epoch))
    assert cached.bad_files == plain.bad_files
    assert len(list(tmp_path.iterdir())) == 11

    decoded = []
    read = frame_cache.read_frames
    monkeypatch.setattr(frame_cache, "read_frames", lambda *a: decoded.append(a[0]) or read(*a))
    list(ClipLoader(bad_samples, config(), cache=str(tmp_path), **common).epoch(2))
    assert decoded and all("bad" in path for path in decoded)


def test_a_cache_file_that_is_cut_short_is_not_used(samples, tmp_path):
    loader = ClipLoader(samples[:1], config(), batch_size=1, cache=str(tmp_path))
    (whole,) = loader.epoch()
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-5])
    (again,) = loader.epoch()
    assert_same([whole], [again])


def test_too_many_bad_files_stop_a_run_with_the_list():
    bad = {"b.mp4": "b.mp4: is damaged", "a.mp4": "a.mp4: contains no frame"}
    check_bad_files(bad, total=200, max_bad_fraction=0.01)
    check_bad_files({}, total=200, max_bad_fraction=0.0)
    listed = r"(?s)0.01 of 199: got 2:\n  a.mp4: contains.*\n  b.mp4: is"
    with pytest.raises(ValueError, match=listed):
        check_bad_files(bad, total=199, max_bad_fraction=0.01)
    with pytest.raises(ValueError, match="to continue without them, raise data.max_bad_fraction; .*"
                       "data.manifest"):  # fmt: skip
        check_bad_files(bad, total=199, max_bad_fraction=0.01)


def test_training_on_every_file_there_is_ends_and_names_the_damaged(clips):
    files = sorted(
        str(path)
        for folder in ("actions", "asl", "derived", "robust")
        for path in (clips / folder).iterdir()
        if path.is_file()
    )
    assert len(files) == 86
    loader = ClipLoader(
        [Sample(path, 0) for path in files],
        config(frames=8),
        batch_size=2,
        augment=AUGMENT,
        workers=2,
    )
    index = torch.cat([batch.index for batch in loader.epoch()])
    named = {os.path.basename(path) for path in loader.bad_files}
    certain = "no_moov empty text bitflips packet__decord"
    certain = {f"CORRUPT_{name}.mp4" for name in certain.split()} | {"NOVIDEO_audio_only.mp4"}
    assert certain <= named <= certain | {"CORRUPT_truncated_faststart.mp4"}
    assert len(index) == 86 and len(set(index.tolist())) >= 86 - len(named) - 1


# Behaviour of the object


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(batch_size=0), "batch_size must be at least 1: got 0"),
        (dict(accumulation=0), "accumulation must be at least 1: got 0"),
        (dict(rank=2, world_size=2), r"rank must be in 0..world_size-1: got 2 of 2"),
        (dict(timeout=0), "timeout must be positive: got 0"),
        (dict(workers=-1), "workers must not be negative: got -1"),
        (dict(batch_size=14), "samples must fill one step of 14 clips: got 13"),
    ],
)
def test_arguments_are_checked_before_any_work(samples, arguments, message):
    with pytest.raises(ValueError, match=message):
        ClipLoader(samples, config(), **(dict(batch_size=2) | arguments))


def test_a_start_step_outside_the_epoch_is_refused(samples):
    loader = ClipLoader(samples, config(), batch_size=2)
    with pytest.raises(ValueError, match=r"start_step must be in 0..6: got 7"):
        loader.epoch(0, start_step=7)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(rand_augment_ops=15), r"augment.rand_augment_ops must be in 0..14: got 15"),
        (dict(rand_augment_magnitude=11), r"augment.rand_augment_magnitude must be in 0..10"),
        (dict(crop_scale=(0.0, 1.0)), "augment.crop_scale must be two ascending fractions"),
        (dict(crop_ratio=(2.0, 1.0)), "augment.crop_ratio must be two ascending positive"),
        (dict(flip=1.5), "augment.flip must be a probability: got 1.5"),
        (dict(erasing=-0.1), "augment.erasing must be a probability: got -0.1"),
    ],
)
def test_augmentation_values_are_checked(values, message):
    with pytest.raises(ValueError, match=message):
        AugmentConfig(**values)


def test_too_little_shared_memory_is_told_before_workers_start(samples, monkeypatch):
    """Docker gives a container 64 MB."""

    def shared_memory(megabytes):
        size = SimpleNamespace(f_bavail=megabytes * 2**20 // 4096, f_frsize=4096)
        monkeypatch.setattr(os, "statvfs", lambda path: size)

    loader = ClipLoader(samples, config(frames=8), batch_size=12, workers=2, augment=AUGMENT)
    # Four batches, each in a part for each worker.
    needed = 4 * 12 * 8 * 256 * 344 * 3
    assert loader.plan.shared_bytes(2) == needed
    shared_memory(64)
    before = multiprocessing.active_children()
    with pytest.raises(ValueError, match="/dev/shm must have 101 MB free .* it has 67; .*--shm-siz"
                       r".*\(optim.micro_batch\) or data.workers=0"):  # fmt: skip
        next(loader.epoch())
    assert multiprocessing.active_children() == before
    shared_memory(110)
    assert len(list(loader.epoch())) == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    again = ClipLoader(samples, config(frames=8), batch_size=12, workers=2)
    with pytest.raises(ValueError, match="/dev/shm must have 812 MB free"):
        next(again.epoch())
    next(ClipLoader(samples, config(frames=8), batch_size=12).epoch())  # which needs none


def test_numbered_frames_are_read_back():
    assert [read_number(numbered_frame(i, 64, 64)) for i in range(256)] == list(range(256))
    assert issubclass(DecodeError, ValueError)


def test_memory_stays_flat_over_1000_clips(samples):
    """A leak of one frame a clip would be 30 MB."""
    loader = ClipLoader(samples * 77, config(), batch_size=2, augment=AUGMENT)
    sizes = []
    for number, _ in enumerate(loader.epoch()):
        if number % 100 == 99:
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            sizes.append(pages * resource.getpagesize() / 2**20)
    assert len(sizes) == 5 and sizes[-1] - sizes[1] < 8, sizes


@pytest.mark.parametrize("mixing", [{}, dict(mixup=0.8)])
@pytest.mark.parametrize("decoder", ["pyav", "dali"])
def test_no_node_of_the_graph_for_a_gpu_is_made_again_to_be_moved_there(
    samples, decoder, mixing, monkeypatch
):
    """DALI merges equal nodes, and loses one that is moved to the GPU as well."""
    h264 = Capability("h264", "4:2:0", 8, 4096, 4096)
    monkeypatch.setattr("zeroi2v.data.pipeline.capabilities", lambda device: (h264,))
    augment = AugmentConfig(erasing=0.25, **mixing)
    loader = ClipLoader(
        samples, config(), batch_size=2, augment=augment, device="cuda:0", decoder=decoder
    )
    clips = ClipSource(loader.plan, 0, 0)
    graph = clip_graph(clips, loader.plan, True, False, batch_size=2, num_threads=1, device_id=0)
    graph._build_graph()
    equal, devices = defaultdict(list), defaultdict(set)  # of which outputs are read there
    for node in graph._ops:
        inputs, rest = str(node.spec).split("  Outputs:\n")
        arguments = rest.split("  Arguments:\n")[1].split("    _origin_stack")[0]
        equal[inputs + arguments].append({edge.name for edge in node.outputs})
        for edge in node.inputs:
            devices[edge.name].add(edge.device)
    for text, nodes in equal.items():
        read = set().union(*(devices[name] for outputs in nodes for name in outputs))
        assert len(nodes) == 1 or len(read) <= 1, text
