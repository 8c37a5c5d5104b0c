"""Frames that DALI's decoder makes of cut groups of pictures, against PyAV's of the whole file."""

import csv
import dataclasses
import gc
import io
import threading
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from loading import AUGMENT, assert_same, config, pixels, whole_decode
from nvidia.dali._multiproc.shared_queue import ShmQueue
from videos import numbered_frame, read_number, write_numbered, write_video

from zeroi2v.data import decode, pipeline
from zeroi2v.data.annotations import Sample
from zeroi2v.data.decode import read_frames
from zeroi2v.data.gop import DALI_CPU, Cut, nvdec
from zeroi2v.data.nvdec import Capability
from zeroi2v.data.pipeline import ClipLoader
from zeroi2v.data.sampling import dense_indices, uniform_indices

pytestmark = pytest.mark.usefixtures("forked_workers")

CODECS = ("h264", "hevc", "av1", "vp9", "mjpeg")
ALL = dataclasses.replace(
    DALI_CPU, capabilities=tuple(Capability(codec, "4:2:0", 8, 4096, 4096) for codec in CODECS)
)
NVDEC = nvdec(ALL.capabilities)
VP9 = {"g": "12", "deadline": "realtime", "cpu-used": "8"}


def decoded(cut: Cut) -> np.ndarray:
    """The frames of a cut, by PyAV in the place of DALI."""
    with av.open(io.BytesIO(cut.data.tobytes())) as container:
        container.streams.video[0].codec_context.thread_count = 1
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack([frames[i] for i in cut.frames])


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("b.mp4", "libx264", {"g": "12", "bf": "3", "b-pyramid": "normal"}),
        ("intra.mkv", "libx264", {"g": "1"}),
        ("hevc.mp4", "libx265", {"x265-params": "keyint=12:open-gop=0:log-level=none"}),
        ("av1.mkv", "libsvtav1", {"g": "12", "preset": "10", "crf": "10"}),
        ("vp9.webm", "libvpx-vp9", VP9),
        ("mjpeg.avi", "mjpeg", {}),
    ],
)
def test_a_cut_holds_the_wanted_frames_and_only_their_groups(tmp_path, name, codec, options):
    path = write_numbered(tmp_path / name, 60, codec, **options)
    for wanted in ([0], [59], [14], [11, 12, 13], [30, 2, 30, 47], range(0, 60, 7)):
        cut = read_frames(path, lambda n, wanted=wanted: np.array(wanted), None, None, 60, 60, ALL)
        assert isinstance(cut, Cut) and (cut.height, cut.width) == (96, 128)
        assert cut.data.dtype == np.uint8 and cut.frames.dtype == np.int32
        frames = decoded(cut)
        assert [read_number(frame) for frame in frames] == list(wanted)
        assert np.array_equal(frames, read_frames(path, lambda n, wanted=wanted: np.array(wanted)))
        with av.open(io.BytesIO(cut.data.tobytes())) as container:
            packets = [p for p in container.demux(video=0) if p.size]
            assert packets[0].is_keyframe and min(p.pts for p in packets) >= 0
            assert container.streams.video[0].frames == len(packets)
        if len(wanted) == 1 and codec != "mjpeg":  # a JPEG may use the tables of one before it
            assert len(packets) <= (1 if name == "intra.mkv" else 12)


def test_cuts_of_real_files_hold_their_frames(clips):
    with open(clips / "manifest.tsv", newline="") as lines:
        rows = [r for r in csv.DictReader(lines, delimiter="\t") if r["status"] == "ok"]
    cuts = set()
    for row in rows:
        path = clips / row["file"]
        want = []

        def choose(total, want=want):
            want[:] = np.random.default_rng(1).integers(total, size=3).tolist()
            return np.array(want)

        got = read_frames(path, choose, None, None, 60, None, ALL)
        if isinstance(got, Cut):
            cuts.add(row["codec"])
            frames, _ = whole_decode(path, set(want))
            assert np.array_equal(decoded(got), np.stack([frames[i] for i in want])), row["file"]
    assert cuts == {"h264", "hevc", "av1", "vp9", "mjpeg"}


@pytest.mark.parametrize(
    "file",
    [
        "robust/rotated_90__decord.mov",
        "robust/rotated_180__decord.mov",
        "robust/rotated_90__nasa_13013.mp4",
        "robust/hevc_10bit_hdr__nasa_13013.mp4",
        "robust/h264_10bit__torchcodec.mp4",
        "derived/walk_h264_444.mp4",
        "derived/walk_h264_opengop.mkv",
        "derived/walk_mpeg2.mpg",
        "derived/walk_vp8.webm",
        "derived/walk_mpeg4_bframes.avi",
        "derived/walk_wmv2.wmv",
        "derived/walk_h264.ts",
        "actions/wave__hmdb51_SchoolRules_0.avi",
    ],
)
def test_what_a_hardware_decoder_might_get_wrong_is_left_to_pyav(clips, file):
    frames = read_frames(clips / file, np.arange, None, None, 60, None, NVDEC)
    assert np.array_equal(frames, read_frames(clips / file, np.arange))


def only_h264(**changes):
    """A decoder of 8-bit 4:2:0 H.264, but for `changes`."""
    h264 = Capability("h264", "4:2:0", 8, 4096, 4096)._replace(**changes)
    return dataclasses.replace(ALL, capabilities=(h264,))


def test_limits_of_size_and_codec_and_a_wrong_count_leave_a_video_to_pyav(tmp_path):
    path = write_numbered(tmp_path / "v.mp4", 20)
    for cutter, count, is_cut in (
        (ALL, None, True),
        (ALL, 20, True),
        (ALL, 19, False),
        (only_h264(min_height=97), None, False),
        (only_h264(min_height=96), None, True),
        (only_h264(max_width=127), None, False),
        (only_h264(max_macroblocks=47), None, False),
        (only_h264(max_macroblocks=48), None, True),
        (only_h264(bits=10), None, False),
        (only_h264(chroma="4:4:4"), None, False),
        (DALI_CPU, None, False),
    ):
        got = read_frames(path, lambda n: np.array([0, 5]), None, None, 60, count, cutter)
        assert isinstance(got, Cut) == is_cut
        frames = decoded(got) if is_cut else got
        assert [read_number(frame) for frame in frames] == [0, 5]


def test_interlaced_frames_are_left_to_pyav(tmp_path):
    fields = {"flags": "+ildct+ilme", "x264-params": "tff=1"}
    path = write_numbered(tmp_path / "i.mp4", 12, size=(96, 128), **fields)
    frames = read_frames(path, lambda n: np.array([0, 9]), None, None, 60, None, ALL)
    assert isinstance(frames, np.ndarray) and [read_number(f) for f in frames] == [0, 9]


# DALI's own decoder, on the CPU


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> list[Sample]:
    """Eight videos of codecs that DALI decodes on the CPU and that it does not."""
    folder = tmp_path_factory.mktemp("videos")
    kinds = (
        ("vp9.webm", "libvpx-vp9", VP9),
        ("h264.mp4", "libx264", {"g": "12"}),
        ("mjpeg.avi", "mjpeg", {}),
        ("mpeg4.avi", "mpeg4", {"bf": "2"}),
        ("vp8.webm", "libvpx", {"g": "12", "deadline": "realtime"}),
    )
    made = [
        write_numbered(folder / name, 50 + i, codec, size=(64, 64), **options)
        for i, (name, codec, options) in enumerate(kinds)
    ]
    images = folder / "images"
    images.mkdir()
    for i in range(30):
        frame = av.VideoFrame.from_ndarray(numbered_frame(i, 64, 64), format="rgb24")
        frame.to_image().save(images / f"img_{i:05}.png")
    part = Sample(made[0], 6, 0.5, 1.2)
    return [Sample(p, i) for i, p in enumerate(made)] + [Sample(str(images), 5), part]


def numbers(batch, cfg) -> list[list[int]]:
    return [[read_number(f) for f in clip] for clip in pixels(batch.video[:, 0], cfg.preprocess)]


@pytest.mark.parametrize("sampling", ["dense", "uniform"])
def test_both_decoders_give_the_published_frames_in_the_same_batches(samples, sampling):
    cfg = config(64, 8, val_short_side=64, sampling=sampling, interval=3)
    loaders = {
        decoder: ClipLoader(samples, cfg, batch_size=7, seed=2, decoder=decoder)
        for decoder in ("pyav", "dali")
    }
    totals = (50, 51, 52, 53, 54, 30)  # the last sample begins in the middle
    for epoch in range(5):
        ours, theirs = (next(iter(loaders[d].epoch(epoch))) for d in ("pyav", "dali"))
        assert torch.equal(ours.index, theirs.index) and torch.equal(ours.label, theirs.label)
        assert numbers(ours, cfg) == numbers(theirs, cfg)
        for index, clip in zip(theirs.index.tolist(), numbers(theirs, cfg), strict=True):
            if index < len(totals):
                rng = np.random.default_rng((2, epoch, 1 + index))
                dense, uniform = dense_indices, uniform_indices
                want = (
                    dense(totals[index], 8, 3, rng=rng)
                    if sampling == "dense"
                    else uniform(totals[index], 8, rng=rng)
                )
                assert clip == want[0].tolist()
        different = pixels((ours.video - theirs.video)[:, 0], cfg.preprocess) - np.array(
            cfg.preprocess.mean
        )
        assert np.abs(different).mean() < 1.5
    assert loaders["pyav"].decoded_by == {"pyav": 7 * 5}
    assert loaders["dali"].decoded_by == {"dali": 3 * 5, "pyav": 4 * 5}


def test_augmentation_is_the_same_for_both_decoders(samples):
    ours, theirs = (
        next(iter(ClipLoader(samples, config(32, 4), decoder=decoder, augment=AUGMENT, batch_size=7)
                  .epoch(1)))
        for decoder in ("pyav", "dali")
    )  # fmt: skip
    assert torch.equal(ours.index, theirs.index)
    # A colour off by one may be on the other side of what solarize or posterize tells apart.
    assert (ours.video - theirs.video).abs().mean() < 0.1


def test_workers_and_resuming_change_nothing_for_dalis_decoder(samples):
    common = dict(batch_size=2, augment=AUGMENT, seed=1, decoder="dali")
    whole = list(ClipLoader(samples, config(), **common).epoch(3))
    loader = ClipLoader(samples, config(), workers=2, **common)
    assert_same(loader.epoch(3, start_step=1), whole[1:])
    assert_same(loader.epoch(4), ClipLoader(samples, config(), **common).epoch(4))


def damage_packets(path: str, out, numbers: tuple[int, ...]) -> str:
    """A copy whose packets of those numbers are noise behind their first quarter."""
    data, rng = bytearray(Path(path).read_bytes()), np.random.default_rng(0)
    with av.open(path) as container:
        packets = [bytes(p) for p in container.demux(video=0) if p.size]
    for number in numbers:
        body = packets[number]
        at, size = data.find(body), len(body)
        assert at > 0
        data[at + size // 4 : at + size] = rng.bytes(size - size // 4)
    out.write_bytes(data)
    return str(out)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_video_that_dali_fails_on_is_named_and_replaced_like_any_bad_one(
    samples, tmp_path, workers
):
    bad = damage_packets(samples[2].path, tmp_path / "bad.avi", (*range(3, 50, 2),))
    mixed = [samples[0], samples[2], Sample(bad, 3), samples[2], samples[0], samples[2]]
    cfg = config(64, 8, val_short_side=64)
    loader = ClipLoader(mixed, cfg, batch_size=2, seed=3, workers=workers, decoder="dali")
    other = ClipLoader(mixed, cfg, batch_size=2, seed=3, decoder="pyav")
    for epoch in (0, 1):
        batches, want = list(loader.epoch(epoch)), list(other.epoch(epoch))
        assert [b.index.tolist() for b in batches] == [b.index.tolist() for b in want]
        assert [numbers(b, cfg) for b in batches] == [numbers(b, cfg) for b in want]
    assert loader.bad_files == other.bad_files and set(loader.bad_files) == {bad}
    assert loader.bad_files[bad].startswith(f"{bad}: damaged after frame")
    assert loader.decoded_by == {"dali": 8, "pyav": 4}  # a micro-batch of each epoch
    again = ClipLoader(mixed, cfg, batch_size=2, seed=3, decoder="dali")
    assert_same(again.epoch(1, start_step=1), batches[1:])


def test_a_lock_of_a_process_that_was_killed_is_not_waited_for(samples, tmp_path, monkeypatch):
    """DALI's thread closes the queue of results, whose lock a process may take to its grave."""
    released = threading.Event()
    monkeypatch.setattr(pipeline, "_PATIENCE", 0.5)
    bad = damage_packets(samples[2].path, tmp_path / "bad.avi", (*range(3, 50, 2),))
    mixed = [samples[2], samples[0], samples[2], samples[0], Sample(bad, 3), samples[2]]
    cfg = config(64, 8, val_short_side=64)
    loader = ClipLoader(mixed, cfg, batch_size=2, workers=2, decoder="dali")
    with monkeypatch.context() as patch:
        close = ShmQueue.close
        patch.setattr(ShmQueue, "close", lambda queue: released.wait(60) and close(queue))
        begun = time.monotonic()
        assert len(list(loader.epoch())) == 3
        gc.collect()
        assert time.monotonic() - begun < 30 and set(loader.bad_files) == {bad}
        released.set()


def test_an_epoch_may_end_with_a_video_that_dali_fails_on(samples, tmp_path):
    bad = damage_packets(samples[2].path, tmp_path / "bad.avi", (*range(3, 50, 2),))
    mixed = [samples[0], samples[2], samples[0], Sample(bad, 3)]
    cfg = config(64, 8, val_short_side=64)
    loader, other = (
        ClipLoader(mixed, cfg, batch_size=2, decoder=decoder) for decoder in ("dali", "pyav")
    )
    last = []
    for epoch in range(6):
        last.append(np.random.default_rng((0, epoch)).permutation(4)[2:].tolist())
        batches, want = list(loader.epoch(epoch)), list(other.epoch(epoch))
        assert [b.index.tolist() for b in batches] == [b.index.tolist() for b in want]
        assert [numbers(b, cfg) for b in batches] == [numbers(b, cfg) for b in want]
    assert sum(3 in rows for rows in last) >= 2
    assert loader.bad_files == other.bad_files and set(loader.bad_files) == {bad}


def test_auto_leaves_to_the_hardware_only_what_a_manifest_vouches_for(samples):
    known = [dataclasses.replace(s, frames=50 + i) for i, s in enumerate(samples[:5])]
    loader = ClipLoader([*known, *samples[5:]], config(), batch_size=7, decoder="auto")
    assert loader.plan.cutter is None and loader.decoder == "PyAV"  # on the CPU
    loader.plan = dataclasses.replace(loader.plan, cutter=DALI_CPU)
    assert "what it can of 5 videos that a manifest knows to be whole; the rest" in loader.decoder
    next(iter(loader.epoch()))
    assert loader.decoded_by == {"dali": 2, "pyav": 5}  # not the part of the first, which is not


def test_a_cache_needs_no_second_decoder(samples, tmp_path):
    loader = ClipLoader(samples[:2], config(), batch_size=2, decoder="dali", cache=str(tmp_path))
    assert loader.plan.cutter is None and len(list(loader.epoch())) == 1


def test_a_file_without_the_frames_its_header_promises_gives_none_of_another(tmp_path, clips):
    """DALI fills what it does not find with what the memory held; it is never asked for that."""
    full = write_video(tmp_path / "other.webm", [numbered_frame(255, 64, 64)] * 40, "libvpx-vp9")
    data = Path(full).read_bytes()
    (tmp_path / "cut.webm").write_bytes(data[: len(data) * 2 // 3])
    lying = clips / "derived/CORRUPT_truncated.mkv"
    frames = read_frames(tmp_path / "cut.webm", np.arange)
    got = read_frames(tmp_path / "cut.webm", np.arange, None, None, 60, None, DALI_CPU)
    assert len(got.frames) == len(frames) < 40 and max(got.frames) == len(frames) - 1
    cut = read_frames(lying, lambda n: uniform_indices(n, 8)[0], None, None, 60, None, ALL)
    assert np.array_equal(decoded(cut), read_frames(lying, lambda n: uniform_indices(n, 8)[0]))


def test_an_unknown_decoder_is_refused(samples):
    with pytest.raises(ValueError, match="decoder must be one of auto, dali, pyav: got 'decord'"):
        ClipLoader(samples, config(), batch_size=2, decoder="decord")


def test_a_cut_is_refused_over_the_time_limit(tmp_path):
    path = write_numbered(tmp_path / "v.mp4", 10)
    with pytest.raises(decode.DecodeError, match="longer"):
        read_frames(path, np.arange, None, None, 1e-9, None, ALL)
