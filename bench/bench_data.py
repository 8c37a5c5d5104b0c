"""Decoding and augmentation, in clips a second, by the distance between keyframes.

On the CPU each contestant gives the same 8 frames of a 300-frame 340x256 H.264 video; that ours
are the frames of a decode of the whole file is checked before anything is timed. Rivals that are
not installed are left out, with the reason. One thread each: parallel work is over clips.

On a GPU also: its decoder compared with PyAV for each codec and for damaged files, its speed, and
how long a training step of ViT-L/14 waits for data. These skip without a GPU, unless DALI decodes
that codec on the CPU.
"""

import time
from functools import partial
from itertools import count
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import VideoReformatter
from videos import ordinary_priority

from bench.cases import parameters
from zeroi2v import RECIPES, VideoViT
from zeroi2v.config import ModelConfig, PreprocessConfig
from zeroi2v.data.annotations import Sample
from zeroi2v.data.decode import read_frames
from zeroi2v.data.pipeline import AugmentConfig, ClipLoader
from zeroi2v.data.sampling import dense_indices

FRAMES, HEIGHT, WIDTH = 300, 256, 340
CLIPS = 6
GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU: there is none")

ENCODERS = {
    "h264": ("mp4", "libx264", {"crf": "23", "sc_threshold": "0"}),
    "hevc": ("mp4", "libx265", {"x265-params": "log-level=none:open-gop=0:scenecut=0"}),
    "av1": ("mp4", "libsvtav1", {"preset": "10", "crf": "30"}),
    "vp9": ("webm", "libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "crf": "30"}),
    "mjpeg": ("avi", "mjpeg", {}),
}


def encode(path: Path, codec: str, gop: int, frames: int = FRAMES, size=(HEIGHT, WIDTH)) -> str:
    """A moving, textured video with a keyframe every `gop` frames."""
    suffix, encoder, options = ENCODERS[codec]
    options = options | {"g": str(gop), "keyint_min": str(gop)}
    if codec == "hevc":
        options["x265-params"] += f":keyint={gop}:min-keyint={gop}"
    path = path.with_suffix(f".{suffix}")
    rng = np.random.default_rng(0)
    height, width = size
    shape = (height // 8 + frames // 8 + 3, width // 8 + frames // 4 + 5, 3)
    picture = np.kron(rng.integers(256, size=shape), np.ones((8, 8, 1), int))
    for axis in (0, 1):  # as soft as a photograph
        picture = sum(np.roll(picture, i, axis) for i in range(8)) // 8
    with ordinary_priority(), av.open(str(path), "w") as container:
        stream = container.add_stream(encoder, rate=30, options=options)
        stream.height, stream.width = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for i in range(frames):
            image = picture[i : i + height, 2 * i : 2 * i + width].astype(np.int16)
            image = np.clip(image + rng.integers(-6, 7, size=image.shape), 0, 255)
            frame = av.VideoFrame.from_ndarray(image.astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return str(path)


class Video(NamedTuple):
    """What is decoded, and how many clips of it."""

    path: str
    gop: int
    frames: int
    num_clips: int

    def clips(self) -> list[np.ndarray]:
        """Indices of clips of 8 frames, 16 apart, as training draws them."""
        rng = np.random.default_rng(1)
        return [dense_indices(self.frames, 8, 16, rng=rng)[0] for _ in range(self.num_clips)]


@pytest.fixture(scope="module", params=(12, 50, 250))
def video(request, tmp_path_factory, timed) -> Video:
    gop = request.param
    frames, num_clips = (FRAMES, CLIPS) if timed else (FRAMES // 2, 2)
    path = tmp_path_factory.mktemp("videos") / f"gop{gop}"
    return Video(encode(path, "h264", gop, frames), gop, frames, num_clips)


def ours(path: str, wanted: np.ndarray) -> np.ndarray:
    return read_frames(path, lambda total: wanted)


def whole_decode(path: str, wanted: np.ndarray) -> np.ndarray:
    """The frames by decoding all before them."""
    frames, convert = {}, VideoReformatter()
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for i, frame in enumerate(container.decode(stream)):
            if i in wanted:
                frames[i] = convert.reformat(frame, format="rgb24", threads=1).to_ndarray()
            if i == max(wanted):
                break
    return np.stack([frames[i] for i in wanted])


def torchcodec(path: str, wanted: np.ndarray, mode: str = "exact") -> np.ndarray:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(path, num_ffmpeg_threads=1, dimension_order="NHWC", seek_mode=mode)
    return decoder.get_frames_at(wanted.tolist()).data.numpy()


def decord(path: str, wanted: np.ndarray) -> np.ndarray:
    from decord import VideoReader

    return VideoReader(path, num_threads=1).get_batch(wanted).asnumpy()


RIVALS = {
    "torchcodec": torchcodec,
    "torchcodec, approximate": partial(torchcodec, mode="approximate"),
    "decord": decord,
}


# As a part of the time of each.
GOALS = {"ours / torchcodec": 1.0, "ours / decord": 0.83}


def bench_decoding(video, compare):
    path, gop, _, num_clips = video
    clips = video.clips()
    truth = np.stack([whole_decode(path, wanted) for wanted in clips])
    contestants, absent = {"ours": ours, "PyAV, whole file": whole_decode}, {}
    for name, rival in RIVALS.items():
        try:
            rival(path, clips[0])
        except (ImportError, OSError, RuntimeError) as error:
            absent[name] = str(error).splitlines()[0]
            print(f"{name} is left out: {absent[name]}")
        else:
            contestants[name] = rival

    def check(name, frames):
        if name == "ours":
            assert np.array_equal(frames, truth)
        # Theirs may round colours otherwise, but a frame away would differ by far more.
        assert np.abs(frames.astype(int) - truth).mean() < 3, name

    def all_clips(read):
        return np.stack([read(path, wanted) for wanted in clips])

    compare(
        {name: partial(all_clips, read) for name, read in contestants.items()},
        baseline="ours",
        check=check,
        absent=absent,
        goals={pair: goal for pair, goal in GOALS.items() if pair.split(" / ")[1] in contestants},
        device="cpu",
        gop=gop,
        clips=num_clips,
        threads=1,
    )


def bench_decoding_and_augmentation(video, compare, timed):
    """A training clip as the loader makes it, whole: decoded, augmented, normalised."""
    path, gop, _, num_clips = video
    config = ModelConfig(num_frames=8)
    samples = [Sample(path, 0)] * num_clips
    augment = AugmentConfig() if timed else AugmentConfig(rand_augment_ops=1)  # built in seconds
    augmented = ClipLoader(samples, config, batch_size=num_clips, augment=augment)
    plain = ClipLoader(samples, config, batch_size=num_clips)
    first, again = (next(iter(augmented.epoch(3))).video for _ in range(2))
    assert first.equal(again) and first.shape == (num_clips, 1, 3, 8, 224, 224)

    epochs = {loader: count(4) for loader in (plain, augmented)}  # in turn: nothing is rebuilt

    def epoch(loader):
        return list(loader.epoch(next(epochs[loader])))

    compare(
        {
            "decode": lambda: [ours(path, wanted) for wanted in video.clips()],
            "decode, crop": partial(epoch, plain),
            "decode, augment": partial(epoch, augmented),
        },
        baseline="decode",
        device="cpu",
        gop=gop,
        clips=num_clips,
        threads=1,
    )


# DALI's decoder: on a GPU the hardware's


def loader_of(path: str, decoder: str, clips: int, device: str, **arguments) -> ClipLoader:
    """Clips of 8 frames of one video, of its own size but for the border."""
    process = PreprocessConfig(val_short_side=HEIGHT, test_short_side=HEIGHT, interval=16)
    config = ModelConfig(num_frames=8, image_size=224, preprocess=process)
    arguments = dict(batch_size=clips, workers=2, device=device) | arguments
    return ClipLoader([Sample(path, 0)] * clips, config, decoder=decoder, **arguments)


@pytest.mark.parametrize("codec", ENCODERS)
def bench_pixels_by_codec(codec, tmp_path, store, device, timed):
    """How far DALI's colours are from PyAV's, on 0..255; the frames must be the same ones."""
    path = encode(tmp_path / codec, codec, 50, frames=100)
    workers = 2 if timed else 0
    loaders = [loader_of(path, name, 4, device, workers=workers) for name in ("pyav", "dali")]
    if loaders[1].plan.cutter is None or not any(
        capability.codec == codec for capability in loaders[1].plan.cutter.capabilities
    ):
        pytest.skip(f"DALI on the {device} leaves {codec} to PyAV")
    theirs, mine = (next(iter(loader.epoch())).video.cpu() for loader in loaders)
    assert loaders[1].decoded_by == {"dali": 4}, loaders[1].bad_files
    std = torch.tensor(loaders[0].plan.config.preprocess.std).view(3, 1, 1, 1)
    difference = ((theirs - mine) * std).abs()  # [B, 1, 3, T, H, W]
    by_frame = difference.mean(dim=(1, 2, 4, 5))
    away = ((theirs.roll(1, dims=3) - mine) * std).abs().mean(dim=(1, 2, 4, 5))
    assert (by_frame < away / 4).all(), (by_frame, away)
    mean, most = float(difference.mean()), float(difference.max())
    rows = {codec: dict(mean_difference=mean, max_difference=most)}
    print(rows)
    store(rows, device=device, gop=50)


@pytest.mark.parametrize("gop", parameters((12, 50, 250), essential=[50]))
def bench_decoders(gop, tmp_path, compare, device):
    """Clips a second of the same loader with either decoder."""
    codec = "h264" if GPU else "vp9"
    path = encode(tmp_path / codec, codec, gop, frames=FRAMES if GPU else 60)
    clips = 256 if GPU else 4
    arguments = dict(batch_size=min(clips, 32), augment=AugmentConfig(), workers=12 if GPU else 1)
    loaders = {name: loader_of(path, name, clips, device, **arguments) for name in ("pyav", "dali")}
    epochs = {name: count() for name in loaders}

    def epoch(name):
        batches = [batch.video for batch in loaders[name].epoch(next(epochs[name]))]
        if GPU:
            torch.cuda.synchronize()
        return sum(map(len, batches))

    def check(name, number):
        assert number == clips
        assert loaders[name].decoded_by == {name: clips}

    compare(
        {name: partial(epoch, name) for name in loaders},
        baseline="pyav",
        check=check,
        codec=codec,
        gop=gop,
        clips=clips,
    )


@needs_gpu
@pytest.mark.parametrize("damage", ["noise in packets", "cut short", "zeros in packets"])
def bench_damaged_files_on_a_gpu(damage, tmp_path, store):
    """What becomes of a damaged video among whole ones: named, concealed, or wrong frames."""
    path = encode(tmp_path / "whole", "h264", 50, frames=100)
    data, rng = bytearray(Path(path).read_bytes()), np.random.default_rng(0)
    if damage == "cut short":  # of a file whose index is in front
        with av.open(path) as source, av.open(str(tmp_path / "bad.mkv"), "w") as container:
            track = container.add_stream_from_template(source.streams.video[0], opaque=True)
            for packet in source.demux(video=0):
                if packet.size:
                    packet.stream = track
                    container.mux(packet)
        data = (tmp_path / "bad.mkv").read_bytes()
        data = data[: len(data) // 2]
    else:
        with av.open(path) as container:
            packets = [bytes(p) for p in container.demux(video=0) if p.size]
        for body in packets[5::7]:
            at, size = data.find(body), len(body) * 3 // 4
            data[at + len(body) - size : at + len(body)] = (
                rng.bytes(size) if damage.startswith("noise") else bytes(size)
            )
    bad = tmp_path / ("cut.mkv" if damage == "cut short" else "bad.mp4")
    bad.write_bytes(data)
    samples = [Sample(path, 0), Sample(str(bad), 1)] * 4
    config = ModelConfig(num_frames=8, num_classes=2)
    loader = ClipLoader(samples, config, batch_size=2, device="cuda", decoder="dali")
    whole, seen = None, []
    for batch in loader.epoch():
        one = batch.video[0].cpu()
        whole = one if whole is None else whole
        assert torch.equal(one, whole)  # the neighbour of a damaged clip is unharmed
        seen.append(batch.index.tolist())
    rows = {damage: dict(named=len(loader.bad_files), decoded_by=dict(loader.decoded_by))}
    print(rows, loader.bad_files)
    store(rows, device="cuda")


@needs_gpu
@pytest.mark.parametrize("decoder", ["dali", "pyav"])
def bench_waiting_of_a_training_step(decoder, tmp_path, store):
    """Share of the time that a training step of ViT-L/14, 8 frames, waits for its clips."""
    path = encode(tmp_path / "v", "h264", 50)
    config = RECIPES["vit_l14_k400_8x16"].model
    samples = [Sample(path, i % 400) for i in range(8 * 40)]
    loader = ClipLoader(
        samples,
        config,
        batch_size=8,
        augment=AugmentConfig(),
        workers=12,
        device="cuda",
        decoder=decoder,
    )
    model = VideoViT(config).cuda().bfloat16().train()
    model.freeze()
    waited, begun, clips = 0.0, None, 0
    batches = loader.epoch()
    for step in range(40):
        if step == 8:  # the workers have started
            torch.cuda.synchronize()
            waited, begun = 0.0, time.perf_counter()
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        logits = model(batch.video.squeeze(1).bfloat16()).float()
        torch.nn.functional.cross_entropy(logits, batch.target.cuda()).backward()
        torch.cuda.synchronize()
        clips += len(batch.index) if step >= 8 else 0
    seconds = time.perf_counter() - begun
    rows = {decoder: dict(waited=waited / seconds, clips_per_second=clips / seconds)}
    print(rows)
    store(rows, device="cuda", model="L/14", frames=8, batch=8)
