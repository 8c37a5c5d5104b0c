"""Facts about each video of a dataset, found by decoding it: JSON lines, one for each video.

`zeroi2v.check_data` writes a manifest; training leaves out the videos that it knows to be bad, and
uses its frame counts of the others. Imports neither torch nor DALI: `inspect_video` runs in
processes of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import av
import numpy as np

from zeroi2v.data.annotations import Sample
from zeroi2v.data.decode import all_frames, times_of
from zeroi2v.data.frame_folder import read_frame_folder
from zeroi2v.data.orientation import oriented
from zeroi2v.data.packets import DecodeError, Limit, open_video, read_index

_HDR = (16, 18)  # transfer characteristics of H.273: PQ, HLG


@dataclass(slots=True)
class VideoFacts:
    """One line of a manifest; None for what could not be found out."""

    path: str
    """Path below the dataset's root."""
    size: int | None = None
    """Size of the file, in bytes."""
    mtime_ns: int | None = None
    """When the file was last changed, in nanoseconds since 1970."""
    sha256: str | None = None
    """Hash of the file."""
    container: str | None = None
    """FFmpeg's name of the format; `images` for a folder of images."""
    codec: str | None = None
    """FFmpeg's name of the codec."""
    width: int | None = None
    """Width of the coded frames, in pixels."""
    height: int | None = None
    """Height of the coded frames, in pixels."""
    fps: float | None = None
    """Frames a second, by the header."""
    header_frames: int | None = None
    """Frames that the header promises; 0 if it says nothing."""
    frames: int | None = None
    """Frames that decoding gives, up to the first error."""
    header_seconds: float | None = None
    """How long the header says the video is."""
    last: float | None = None
    """When the last frame is shown, in seconds from the first."""
    keyframes: int | None = None
    """Packets marked as keyframes."""
    orientation: str | None = None
    """How the file asks to be turned, as `orientation.Orientation` says it."""
    pixel_aspect: float | None = None
    """Width of a pixel by its height; frames are not stretched by it."""
    hdr: bool | None = None
    """Whether brightness is coded for high dynamic range (PQ or HLG), which is not undone."""
    vfr: bool | None = None
    """Whether frames are shown for different times."""
    open_gop: bool | None = None
    """Whether frames stored after a later keyframe are shown before it."""
    error: str | None = None
    """Why the video is bad; None for a good one."""


def inspect_video(path: str, name: str, timeout: float | None = None) -> VideoFacts:
    """Decodes all of the video at `path` and describes it; it is called `name` there.

    Never raises for a bad file: `error` says what is wrong.
    """
    facts = VideoFacts(name)
    try:
        status = os.stat(path)
        facts.size, facts.mtime_ns = status.st_size, status.st_mtime_ns
        if os.path.isdir(path):
            _inspect_folder(path, facts)
        else:
            _inspect_file(path, facts, Limit(timeout))
    except DecodeError as error:
        facts.error = str(error).removeprefix(f"{path}: ")
    except av.error.ExitError:
        facts.error = f"takes longer to read than the time limit of {timeout:g} s"
    except (av.FFmpegError, OSError) as error:
        facts.error = getattr(error, "strerror", None) or str(error)
    return facts


def _inspect_file(path: str, facts: VideoFacts, limit: Limit) -> None:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    facts.sha256 = digest.hexdigest()
    container, stream = open_video(path, limit)
    with container:
        codec = stream.codec_context
        facts.container, facts.codec = container.format.name, codec.codec.canonical_name
        facts.width, facts.height = codec.width, codec.height
        facts.fps = round(float(stream.average_rate), 3) if stream.average_rate else None
        facts.header_frames = stream.frames
        facts.header_seconds = container.duration and round(container.duration / 1e6, 3)
        aspect = stream.sample_aspect_ratio or codec.sample_aspect_ratio
        facts.pixel_aspect = round(float(aspect), 4) if aspect else 1.0
        facts.hdr = int(codec.color_trc) in _HDR
        index = read_index(container, stream, limit)
        facts.keyframes, facts.last = sum(index.is_key), round(float(index.times[-1]), 3)
        if None not in index.pts:
            facts.open_gop = _has_leading_frames(index.pts, index.is_key)
    facts.frames, size, stamps, fields = 0, None, [], 0
    container, stream = open_video(path, limit)
    with container:
        try:
            for frame, orientation in oriented(all_frames(container, stream, limit)):
                facts.orientation = str(orientation)
                if frame.is_corrupt:
                    raise DecodeError(f"frame {facts.frames} is damaged")
                size = size or (frame.width, frame.height)
                if size != (frame.width, frame.height):
                    raise DecodeError(f"changes its frames at frame {facts.frames}")
                facts.frames += 1
                stamps.append(frame.pts)
                fields += 2 if frame.interlaced_frame else 1
        except av.FFmpegError as error:
            reason = f"damaged after frame {facts.frames}: {error.strerror}"
            raise DecodeError(reason) from None
        time_base = float(stream.time_base)  # gone with the container
    if not facts.frames:
        raise DecodeError("contains no frame")
    if facts.header_frames == len(index.pts) == fields:
        facts.header_frames = facts.frames  # packets of one field each, all of them there
    times = times_of(stamps, time_base, index)
    facts.last, gaps = round(float(times[-1]), 3), np.diff(times)
    if None not in stamps and len(gaps):
        facts.vfr = bool(np.ptp(gaps) > max(2.5 * time_base, 0.02 * np.median(gaps)))


def _has_leading_frames(pts: list[int], is_key: list[bool]) -> bool:
    """Whether a packet after the second or a later keyframe is shown before that keyframe."""
    keys = [i for i, key in enumerate(is_key) if key][1:]
    ends = [*keys[1:], len(pts)]
    return any(min(pts[i:end]) < pts[i] for i, end in zip(keys, ends, strict=False))


def _inspect_folder(path: str, facts: VideoFacts) -> None:
    facts.container = facts.codec = "images"
    facts.frames, total = 0, None

    def one(count: int) -> np.ndarray:
        nonlocal total
        total = count
        return np.array([facts.frames])

    while facts.frames != total:
        _, facts.height, facts.width, _ = read_frame_folder(path, one).shape
        facts.frames += 1


def read_manifest(path: str | os.PathLike) -> dict[str, VideoFacts]:
    """The lines of a manifest by the names of their videos; one cut short is left out.

    Raises OSError if there is none, ValueError that names the line if it is something else.
    """
    rows, known = {}, {f.name for f in fields(VideoFacts)}
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line) if line else None
        except json.JSONDecodeError:
            if number == len(lines):
                break
            values = ()
        if values is None:
            continue
        if not isinstance(values, dict) or set(values) != known:
            raise ValueError(f"{path} line {number}: must be a line of a manifest: got {line!r}")
        rows[values["path"]] = VideoFacts(**values)
    return rows


def manifest_line(facts: VideoFacts) -> str:
    """The line of a manifest, with its end."""
    return json.dumps(asdict(facts)) + "\n"


def manifest_name(path: str, root: str | os.PathLike | None) -> str:
    """What a manifest calls the video at `path` of a list read with `root`."""
    return os.path.relpath(path, root or ".")


def use_manifest(
    samples: list[Sample],
    manifest: str | os.PathLike,
    root: str | os.PathLike | None,
    of_this_list: bool = True,
) -> tuple[list[Sample], dict[str, str]]:
    """What the manifest knows of the samples: (all of them, path -> reason of the bad ones).

    Those that it knows to be whole come back with their number of frames. A bad file that has
    changed since is not known. Raises as `read_manifest` does, and ValueError if the manifest has
    none of the samples, though it should be `of_this_list`.
    """
    rows, bad = read_manifest(manifest), {}
    facts = {s.path: rows.get(manifest_name(s.path, root)) for s in samples}
    if of_this_list and not any(facts.values()):
        raise ValueError(
            f"{manifest} must be a manifest of the list, made with the same root: it has none of "
            f"{len(facts)} videos, such as {manifest_name(samples[0].path, root)}"
        )
    for path, row in facts.items():
        if row is None or row.error is None:
            continue
        try:
            status = os.stat(path)
        except OSError:
            pass
        else:
            if (status.st_size, status.st_mtime_ns) != (row.size, row.mtime_ns):
                continue
        bad[path] = f"{path}: {row.error}"
    known = [
        replace(sample, frames=facts[sample.path].frames)
        if facts[sample.path] is not None and facts[sample.path].error is None
        else sample
        for sample in samples
    ]
    return known, bad
