"""Decoding and augmentation on the CPU, in clips a second, by the distance between keyframes.

Each contestant gives the same 8 frames of a 300-frame 340x256 H.264 video; that ours are the
frames of a decode of the whole file is checked before anything is timed. Rivals that are not
installed are left out, with the reason. One thread each: parallel work is over clips.
"""

from functools import partial
from itertools import count

import av
import numpy as np
import pytest
from av.video.reformatter import VideoReformatter

from zeroi2v.config import ModelConfig
from zeroi2v.data.annotations import Sample
from zeroi2v.data.decode import read_frames
from zeroi2v.data.pipeline import AugmentConfig, ClipLoader
from zeroi2v.data.sampling import dense_indices

FRAMES, HEIGHT, WIDTH = 300, 256, 340
CLIPS = 6


@pytest.fixture(scope="module", params=(12, 50, 250))
def video(request, tmp_path_factory) -> tuple[str, int]:
    """A moving, textured video with a keyframe every `gop` frames."""
    gop = request.param
    path = str(tmp_path_factory.mktemp("videos") / f"gop{gop}.mp4")
    rng = np.random.default_rng(0)
    coarse = rng.integers(256, size=(HEIGHT // 8 + 40, WIDTH // 8 + 80, 3), dtype=np.uint8)
    picture = np.kron(coarse, np.ones((8, 8, 1), np.uint8))
    options = {"g": str(gop), "keyint_min": str(gop), "sc_threshold": "0", "crf": "23"}
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=30, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for i in range(FRAMES):
            image = picture[i : i + HEIGHT, 2 * i : 2 * i + WIDTH].astype(np.int16)
            image = np.clip(image + rng.integers(-6, 7, size=image.shape), 0, 255)
            frame = av.VideoFrame.from_ndarray(image.astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path, gop


def clips_of(number: int) -> list[np.ndarray]:
    """Indices of clips of 8 frames, 16 apart, as training draws them."""
    rng = np.random.default_rng(1)
    return [dense_indices(FRAMES, 8, 16, rng=rng)[0] for _ in range(number)]


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


def torchcodec(path: str, wanted: np.ndarray) -> np.ndarray:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(path, num_ffmpeg_threads=1, dimension_order="NHWC")
    return decoder.get_frames_at(wanted.tolist()).data.numpy()


def decord(path: str, wanted: np.ndarray) -> np.ndarray:
    from decord import VideoReader

    return VideoReader(path, num_threads=1).get_batch(wanted).asnumpy()


def rivals(path: str, wanted: np.ndarray) -> dict:
    """The rivals that are there and give the right frames."""
    found, truth = {}, whole_decode(path, wanted).astype(int)
    for rival in (torchcodec, decord):
        try:
            frames = rival(path, wanted)
        except (ImportError, OSError, RuntimeError) as error:
            print(f"{rival.__name__} is left out: {str(error).splitlines()[0]}")
            continue
        # Their colour conversion may round otherwise, but a frame away would differ by far more.
        assert np.abs(frames - truth).mean() < 3, rival.__name__
        found[rival.__name__] = rival
    return found


def bench_decoding(video, compare):
    path, gop = video
    clips = clips_of(CLIPS)
    for wanted in clips:
        assert np.array_equal(ours(path, wanted), whole_decode(path, wanted))

    def all_clips(read):
        for wanted in clips:
            read(path, wanted)

    contestants = {"ours": ours, "PyAV, whole file": whole_decode, **rivals(path, clips[0])}
    rows = compare(
        {name: partial(all_clips, read) for name, read in contestants.items()},
        baseline="ours",
        gop=gop,
        clips=CLIPS,
        threads=1,
    )
    if rows:
        for name, row in rows.items():
            print(f"{name}: {CLIPS / row['seconds']:.1f} clips/s at GOP {gop}")


def bench_decoding_and_augmentation(video, compare):
    """A training clip as the loader makes it, whole: decoded, augmented, normalised."""
    path, gop = video
    config = ModelConfig(num_frames=8)
    samples = [Sample(path, 0)] * CLIPS
    augmented = ClipLoader(samples, config, batch_size=CLIPS, augment=AugmentConfig())
    plain = ClipLoader(samples, config, batch_size=CLIPS)
    first, again = (next(iter(augmented.epoch(3))).video for _ in range(2))
    assert first.equal(again) and first.shape == (CLIPS, 1, 3, 8, 224, 224)

    epochs = {loader: count(4) for loader in (plain, augmented)}  # in turn: nothing is rebuilt

    def epoch(loader):
        return list(loader.epoch(next(epochs[loader])))

    compare(
        {
            "decode": lambda: [ours(path, wanted) for wanted in clips_of(CLIPS)],
            "decode, crop": partial(epoch, plain),
            "decode, augment": partial(epoch, augmented),
        },
        baseline="decode",
        gop=gop,
        clips=CLIPS,
        threads=1,
    )
