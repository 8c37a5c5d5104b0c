"""What the server computes, in a process of its own: see `worker.py`. Knows nothing of the web."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import av
import torch
from PIL import Image
from torch import nn

from zeroi2v.data.annotations import Sample
from zeroi2v.data.packets import Limit, open_video
from zeroi2v.data.views import ViewLoader
from zeroi2v.drawing.attention_maps import draw_strip
from zeroi2v.drawing.preview import write_preview
from zeroi2v.drawing.timeline import UNIFORM_SECONDS, timeline
from zeroi2v.inference import choose_device, predict
from zeroi2v.model.vit import VideoViT
from zeroi2v.serve.limits import Limits, Refused
from zeroi2v.storage.checkpoint import fetch
from zeroi2v.storage.runtimes import load_deployed
from zeroi2v.visualize import attention_maps, name_of, rows_of, token_of, usual_query

WINDOWS = 60
"""Most windows of a timeline: those of a long video lie further apart."""
PLAYED = {"mov,mp4,m4a,3gp,3g2,mj2": {"h264", "av1"}, "matroska,webm": {"vp8", "vp9", "av1"}}
"""Containers and codecs that browsers play as they are, of 8 bits and 4:2:0."""


class Jobs:
    """The models, and what can be asked of them: each public method is a kind of request."""

    def __init__(self, models: list[str], device: str | None, limits: Limits):
        self._device, self._limits = choose_device(device), limits
        short = [Path(os.path.abspath(name)).name for name in models]
        self._names = short if len(set(short)) == len(short) else models
        self._models = [load_deployed(fetch(name), self._device) for name in models]

    def about(self) -> list[dict[str, Any]]:
        """Name, classes and frames of each model, and whether what its heads read can be drawn."""
        return [
            {
                "name": name,
                "classes": model.config.num_classes,
                "labels": model.config.labels,
                "frames": model.config.num_frames,
                "attention": isinstance(model, VideoViT),
            }
            for name, model in zip(self._names, self._models, strict=True)
        ]

    def classify(self, path: str, topk: int, with_timeline: bool) -> dict[str, Any]:
        """The `topk` classes of a video by each model, and what happens when, if it is long.

        Returns `seconds`, `width`, `height` and `results`, for each model `model`, `topk` and
        `timeline`, which is None for a video that is hardly longer than a window.
        """
        about, results = self._checked(path), []
        for name, model in zip(self._names, self._models, strict=True):
            (found,) = predict(model, [path], topk)
            if "error" in found:
                raise Refused(found["error"])
            result = {"model": name, "topk": found["topk"], "timeline": None}
            window = self._window(model, about)
            if with_timeline and about["seconds"] > 1.5 * window:
                stride = max(window / 2, about["seconds"] / WINDOWS)
                result["timeline"] = timeline(model, path, window, stride, topk=1)
                del result["timeline"]["path"]
                about["seconds"] = result["timeline"]["seconds"]
            results.append(result)
        return {k: about[k] for k in ("seconds", "width", "height")} | {"results": results}

    def attention(self, path: str, number: int, moment: float) -> bytes:
        """A PNG of what the shifted heads of model `number` read at `moment`, in seconds.

        It is of the last block, and of the clip whose middle is that moment.
        """
        model, about = self._models[number], self._checked(path)
        if not isinstance(model, VideoViT):
            raise Refused(f"attention needs a model folder: got {self._names[number]}")
        window = self._window(model, about)
        moment = min(max(moment, 0.0), about["seconds"])
        start = max(0.0, min(moment - window / 2, about["seconds"] - window))
        part = (
            Sample(path, 0, start, start + window) if window < about["seconds"] else Sample(path, 0)
        )
        loader = ViewLoader([part], model.config, batch_size=1, device=self._device)
        video = next(iter(loader.epoch())).video[:, 0]
        if loader.bad_files:
            raise Refused(loader.bad_files[part.name])
        pixels, config = model.config.preprocess, model.config
        mean, std = (torch.tensor(x).view(3, 1, 1, 1) for x in (pixels.mean, pixels.std))
        images = (video[0].cpu() * std + mean).round().clamp(0, 255).to(torch.uint8)
        last = config.depth - 1
        query, video = usual_query(config), video.to(next(model.parameters()).dtype)
        maps = attention_maps(model.eval(), video, [last], token_of(query, config))
        span = min(window, about["seconds"])
        place = int((moment - start) / max(span, 1e-6) * config.num_frames)
        about = (
            f"{self._names[number]}: where its heads look at {moment:.1f} s",
            f"the last layer; the query is {name_of(query)}; {span:.1f} s of it",
        )
        rows = rows_of(maps[last], config, None)
        frames = images.permute(1, 2, 3, 0).numpy()
        picture = draw_strip(frames, rows, about, query, min(place, config.num_frames - 1))
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "png")
        return file.getvalue()

    def preview(self, path: str, out: str) -> bool:
        """Whether a browser plays the file itself; if not, a film it plays is written to `out`."""
        if self._checked(path)["played"]:
            return True
        write_preview(path, Path(out), timeout=self._limits.seconds)
        return False

    def _checked(self, path: str) -> dict[str, Any]:
        """What the header says of a video. Raises Refused if that goes over a limit."""
        limits = self._limits
        try:
            container, stream = open_video(path, Limit(limits.seconds))
        except (av.FFmpegError, OSError) as error:
            raise Refused(f"{path}: {getattr(error, 'strerror', None) or error}") from None
        except ValueError as error:
            raise Refused(f"{path}: {error}") from None
        with container:
            codec = stream.codec_context
            if codec.width * codec.height > 1e6 * limits.megapixels:
                raise Refused(
                    f"{path}: frames must be at most {limits.megapixels:g} megapixels: "
                    f"got {codec.width}x{codec.height}"
                )
            rate = float(stream.average_rate or 25)
            seconds = max((container.duration or 0) / 1e6, stream.frames / rate)
            if stream.duration and stream.time_base:
                seconds = max(seconds, float(stream.duration * stream.time_base))
            if seconds > 60 * limits.minutes:
                raise Refused(
                    f"{path}: video must be at most {limits.minutes:g} minutes long: "
                    f"its header promises {seconds / 60:.0f}"
                )
            if not seconds:  # the header says nothing
                times = [float(p.pts * p.time_base) for p in container.demux(stream) if p.pts]
                seconds = max(times, default=0.0) - min(times, default=0.0) + 1 / rate
                if seconds > 60 * limits.minutes:
                    raise Refused(
                        f"{path}: video must be at most {limits.minutes:g} minutes long: "
                        f"got {seconds / 60:.0f}"
                    )
            played = codec.codec.canonical_name in PLAYED.get(container.format.name, ())
            # What a browser records says no length, and its player would show none.
            played = played and container.duration is not None
            return {
                "seconds": round(seconds, 3),
                "width": codec.width,
                "height": codec.height,
                "rate": rate,
                "played": played and codec.pix_fmt == "yuv420p",
            }

    def _window(self, model: nn.Module, about: dict[str, Any]) -> float:
        """Seconds that a clip of the model spans."""
        pixels = model.config.preprocess
        if pixels.sampling == "uniform":
            return UNIFORM_SECONDS
        return model.config.num_frames * pixels.interval / about["rate"]
