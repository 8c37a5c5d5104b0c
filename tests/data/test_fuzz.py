"""Damaged at random: no file crashes or hangs the decoder, or gives frames that are not its own.

ZEROI2V_FUZZ sets the number of damaged files (default 320): `ZEROI2V_FUZZ=5000 pytest
tests/data/test_fuzz.py`. Each is made from its own number, so a failure can be made again.
"""

import hashlib
import io
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import VideoReformatter
from videos import write_numbered

from zeroi2v.data.decode import read_frames
from zeroi2v.data.gop import DALI_CPU, Cut, Cutter
from zeroi2v.data.manifest import inspect_video
from zeroi2v.data.nvdec import Capability
from zeroi2v.data.packets import DecodeError

COUNT = int(os.environ.get("ZEROI2V_FUZZ", "320"))
TIMEOUT = 5.0
HARDWARE = tuple(
    Capability(codec, "4:2:0", 8, 4096, 4096) for codec in ("h264", "hevc", "av1", "vp9")
)
CUTTERS = (DALI_CPU, replace(DALI_CPU, capabilities=HARDWARE))

MADE = {
    "b.mp4": ("libx264", {"g": "8", "bf": "2"}),
    "h264.mkv": ("libx264", {"g": "12"}),
    "hevc.mp4": ("libx265", {"x265-params": "keyint=8:log-level=none"}),
    "vp9.webm": ("libvpx-vp9", {"g": "8", "deadline": "realtime", "cpu-used": "8"}),
    "mpeg4.avi": ("mpeg4", {"g": "8", "bf": "2"}),
    "h264.ts": ("libx264", {"g": "8"}),
    "mjpeg.avi": ("mjpeg", {}),
    "mpeg2.mpg": ("mpeg2video", {"g": "8"}),
    "flv.flv": ("flv", {"g": "8"}),
    "wmv.wmv": ("wmv2", {"g": "8"}),
}
REAL = (
    "robust/unordered_bframes__decord.mov",
    "robust/discard_first_keyframe__torchcodec.mp4",
    "derived/walk_3frames.mp4",
    "derived/walk_h263_qcif.3gp",
    "derived/walk_vp8.webm",
)


def damage(data: bytes, rng: np.random.Generator, other: bytes) -> bytes:
    """`data` changed in one to three places."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        # Half of the damage goes where headers are: the first and the last kilobyte.
        where = int(rng.integers(len(data)))
        if rng.random() < 0.5:
            near = int(rng.integers(min(1024, len(data))))
            where = near if rng.random() < 0.5 else len(data) - 1 - near
        size = int(rng.integers(1, 1 + min(len(data) - where, 400)))
        match rng.integers(8):
            case 0:
                data[where] ^= 1 << int(rng.integers(8))
            case 1:
                data[where : where + size] = rng.bytes(size)
            case 2:
                data[where : where + size] = bytes(size)
            case 3:
                del data[where : where + size]
            case 4:
                data[where:where] = data[where : where + size]
            case 5:
                data[where : where + 4] = b"\xff\xff\xff\xff"
            case 6:
                del data[max(1, where) :]
            case 7:
                begin = int(rng.integers(len(other)))
                data[where : where + size] = other[begin : begin + size]
        if not data:
            break
    return bytes(data)


def digest(frame: np.ndarray) -> str:
    return hashlib.md5(np.ascontiguousarray(frame).tobytes()).hexdigest()


@cache
def decoded_source(path: str) -> frozenset[str]:
    return frozenset(map(digest, decoded(path)[0]))


def decoded(path: str | io.BytesIO) -> tuple[list[np.ndarray], bool, bool]:
    """The frames a decode of the whole file gives, past errors; whether it had none; and whether
    the frames come in the order of their time stamps."""
    frames, whole, stamps = [], True, []
    convert = VideoReformatter()
    try:
        with av.open(path, metadata_errors="ignore") as container:
            stream = container.streams.best("video")
            stream.codec_context.thread_count = 1
            errors = 0
            packets = container.demux(stream)
            while errors < 50:
                try:
                    packet = next(packets)
                    for frame in packet.decode():
                        image = np.rot90(
                            convert.reformat(frame, format="rgb24", threads=1).to_ndarray(),
                            round(frame.rotation / 90),
                        )
                        frames.append(image)
                        stamps.append(frame.pts)
                        whole = whole and not frame.is_corrupt
                except StopIteration:
                    break
                except av.FFmpegError:
                    whole = False
                    errors += 1
    except (av.FFmpegError, AttributeError, IndexError):
        whole = False
    return frames, whole, None not in stamps and stamps == sorted(stamps)


def attack(number: int, sources: list[str], folder: str) -> dict:
    """Damages a file and reads it; runs in a process of its own, which it may kill."""
    rng = np.random.default_rng((7, number))
    source, other = (Path(sources[i]) for i in (number % len(sources), rng.integers(len(sources))))
    path = os.path.join(folder, f"{number}{source.suffix}")
    Path(path).write_bytes(damage(source.read_bytes(), rng, other.read_bytes()))
    totals, wanted = [], []

    def choose(total):
        totals.append(total)
        wanted[:] = draw(number, total)
        return np.array(wanted)

    begun, frames, error = time.perf_counter(), [], ""
    try:
        frames = read_frames(path, choose, timeout=TIMEOUT)
    except DecodeError as caught:
        error = str(caught)
    seconds = time.perf_counter() - begun
    begun = time.perf_counter()
    facts = inspect_video(path, "x", TIMEOUT)
    seconds = max(seconds, time.perf_counter() - begun)
    images, whole, ordered = decoded(path)
    truth = [digest(image) for image in images]
    mine, true_frames = (
        [digest(frame) for frame in frames],
        set(truth) | decoded_source(str(source)),
    )
    result = dict(source=source.name, error=error, seconds=seconds, wrong="")
    for cutter in CUTTERS:
        wrong = attack_cut(path, number, cutter, images, whole and ordered)
        result["wrong"] = result["wrong"] or wrong
    os.remove(path)
    if error and path not in error:
        result["wrong"] = f"does not name the file: {error}"
    if mine and not set(mine) <= true_frames:
        result["wrong"] = "frames that are not its own"
    # A decoder may drop a damaged frame without a word: then the packets are more than the frames.
    if mine and whole and totals[-1] < len(truth):
        result["wrong"] = f"{totals[-1]} of {len(truth)} frames"
    if mine and whole and totals[-1] == len(truth) and mine != [truth[i] for i in wanted]:
        result["wrong"] = f"not the frames {wanted}"
    if whole and truth and facts.error is None and facts.frames != len(truth):
        result["wrong"] = f"check_data counts {facts.frames} of {len(truth)} frames"
    return result


def draw(number: int, total: int) -> list[int]:
    return np.random.default_rng((8, number)).integers(total, size=4).tolist()


def attack_cut(
    path: str, number: int, cutter: Cutter, images: list[np.ndarray], whole: bool
) -> str:
    """What is wrong with the frames of the file's cut, if it has one.

    Damage that no decoder notices shows in the number of frames, which a manifest knows, or in
    their order.
    """
    wanted, count = [], len(images) or None

    def choose(total):
        wanted[:] = draw(number, total)
        return np.array(wanted)

    try:
        cut = read_frames(path, choose, timeout=TIMEOUT, frames=count, cut=cutter)
    except DecodeError:
        return ""
    if not isinstance(cut, Cut):
        return ""
    if cutter is DALI_CPU:
        frames = decoded_by_dali(cut)
        if whole and (frames is None or len(frames) != len(wanted)):
            return "DALI fails on a whole file"
        allowed = 6  # rounds colours otherwise; a frame away would differ by more
    else:
        parts, *_ = decoded(io.BytesIO(cut.data.tobytes()))
        if whole and len(parts) <= max(cut.frames):
            return f"the cut has {len(parts)} frames, not {max(cut.frames) + 1}"
        frames = [parts[i] for i in cut.frames] if whole else []
        allowed = 0
    if whole:
        for frame, i in zip(frames, wanted, strict=True):
            if np.abs(frame.astype(int) - images[i]).mean() > allowed:
                return f"frame {i} of the cut is not that of the file"
    return ""


def decoded_by_dali(cut: Cut) -> list[np.ndarray] | None:
    """The frames by DALI on the CPU; None if it fails, and may: it must not crash."""
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def graph():
        data = fn.external_source(lambda: [cut.data])
        picks = fn.external_source(lambda: [cut.frames])
        return fn.decoders.video(data, frames=picks, pad_mode="edge")

    try:
        return list(np.array(graph().run()[0].at(0)))
    except RuntimeError:
        return None


def run_attacks(sources: list[str], folder: Path, numbers: range) -> list[dict]:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(2, os.cpu_count()), mp_context=spawn) as pool:
        jobs = [pool.submit(attack, number, sources, str(folder)) for number in numbers]
        # BrokenProcessPool here: one of the damaged files crashed the decoder.
        return [job.result(timeout=120) for job in jobs]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("made")
    return [
        write_numbered(folder / name, 24, codec, size=(64, 64), **options)
        for name, (codec, options) in MADE.items()
    ]


def check(results: list[dict]) -> None:
    wrong = [(i, r["source"], r["wrong"]) for i, r in enumerate(results) if r["wrong"]]
    assert not wrong, wrong
    assert max(r["seconds"] for r in results) < TIMEOUT + 2
    # The damage is of the right kind: it spoils many files, and leaves others readable.
    bad = sum(bool(r["error"]) for r in results)
    assert 0.1 * len(results) < bad < 0.9 * len(results), bad


@pytest.mark.timeout(60 + COUNT)
def test_damaged_made_files_give_their_own_frames_or_an_error(made, tmp_path):
    check(run_attacks(made, tmp_path, range(COUNT * 3 // 4)))


@pytest.mark.timeout(60 + COUNT)
def test_damaged_real_files_give_their_own_frames_or_an_error(clips, tmp_path):
    sources = [str(clips / name) for name in REAL]
    check(run_attacks(sources, tmp_path, range(COUNT // 4)))
