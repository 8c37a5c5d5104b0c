"""Which frames and patches the heads of a model look at, as pictures and a film.

    python -m zeroi2v.visualize MODEL VIDEO [--out DIR] [--layers 0 3] [--query 5,8] [--heads 0 1]

Of each layer asked for (the last one, if none is) it writes, for one clip of the video:

`layer3.png`          a grid: query frames from left to right, heads from top to bottom; each cell
                      is the frame that the head reads then, lit where it looks
`layer3_frame2.png`   one query frame: the clip as a strip for each head, an arrow to what it reads
`layer3.mp4`          that strip for every query frame in turn

The attention is that of the reference (`zeroi2v_kernels.stdha`) on the model's own activations, by
the preprocessing of validation. Adapted and merged models give the same pictures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from zeroi2v_kernels.stdha import source_frames

from zeroi2v.cli import run
from zeroi2v.config import ModelConfig
from zeroi2v.data.annotations import Sample
from zeroi2v.data.views import ViewLoader
from zeroi2v.drawing.attention_maps import Row, draw_grid, draw_strip
from zeroi2v.files import whole_file
from zeroi2v.inference import default_device
from zeroi2v.model.vit import VideoViT
from zeroi2v.storage.checkpoint import fetch, load, model_folder

SECONDS_A_FRAME = 0.7
"""How long the film stays at a query frame."""
_RATE = 10


@torch.no_grad()
def attention_maps(
    model: VideoViT, video: Tensor, layers: Sequence[int], token: int = 0
) -> dict[int, Tensor]:
    """Where `token` of each frame looks, by head.

    Args:
        model: adapted, merged or plain, in eval mode.
        video: one normalised clip, `[1, 3, T, H, W]`.
        layers: blocks to look into, from 0.
        token: the query; those before the patches come first, of these CLS.
    Returns:
        For each layer, float32 `[T, H, N]` on the CPU: the softmax over the N tokens of the frame
        that head h reads for query frame t, which is `source_frames(T, head_offsets[h])[t]`.
    """
    maps, x = {}, model.embed(video)
    for number, block in enumerate(model.transformer.resblocks):
        if number == model.config.adapt_from > 0:
            x = model.timed(x)
        if number in layers:
            attn = block.attn
            qkv = attn.project(attn.in_adapter(block.ln_1(x)))
            query, key, _ = qkv[0].float().unbind(2)  # [T, N, H, D]
            sources = (source_frames(len(key), offset) for offset in attn.head_offsets)
            key = torch.stack([key[frames, :, h] for h, frames in enumerate(sources)], dim=2)
            scores = torch.einsum("t h d, t m h d -> t h m", query[:, token], key)
            maps[number] = (scores * query.shape[-1] ** -0.5).softmax(-1).cpu()
        x = block(x)
    return maps


@dataclass(frozen=True, slots=True)
class Clip:
    """The one clip of a video that is looked at."""

    video: Tensor
    """Normalised, `[1, 3, T, H, W]`."""
    images: np.ndarray
    """The same as pixels, uint8 `[T, H, W, 3]`."""


def read_clip(model: VideoViT, path: str) -> Clip:
    """The clip that validation would take of video `path`. Raises ValueError if it has none."""
    loader = ViewLoader([Sample(path, 0)], model.config, batch_size=1)
    video = next(iter(loader.epoch())).video[:, 0]
    if loader.bad_files:
        raise ValueError(f"can't be decoded: {loader.bad_files[path]}")
    pixels = model.config.preprocess
    mean, std = (torch.tensor(x).view(3, 1, 1, 1) for x in (pixels.mean, pixels.std))
    images = (video[0] * std + mean).round().clamp(0, 255).to(torch.uint8)
    return Clip(video, images.permute(1, 2, 3, 0).numpy())


def rows_of(attention: Tensor, config: ModelConfig, heads: Sequence[int] | None) -> list[Row]:
    """What to draw of one layer's `attention [T, H, N]` in a model of `config`, head by head.

    `heads` are drawn each by itself; None draws every shifted head, and the mean of the others.
    """
    num_frames, head_offsets = len(attention), config.head_offsets
    patches = attention[:, :, config.num_prefix :].unflatten(-1, (config.grid, -1)).numpy()
    spatial = [h for h, offset in enumerate(head_offsets) if offset == 0]
    if heads is None:
        groups = [[h] for h, offset in enumerate(head_offsets) if offset]
        groups += [spatial] if spatial else []
    else:
        groups = [[h] for h in heads]
    return [
        Row(
            _name(group),
            head_offsets[group[0]],
            source_frames(num_frames, head_offsets[group[0]]),
            patches[:, group].mean(1),
        )
        for group in groups
    ]


def _name(heads: list[int]) -> str:
    """`[2, 3, 4]` -> "mean of heads 2-4"; "head 2" for one."""
    if len(heads) == 1:
        return f"head {heads[0]}"
    whole = heads == list(range(heads[0], heads[-1] + 1))
    return f"mean of heads {heads[0]}-{heads[-1]}" if whole else f"mean of {len(heads)} heads"


def write_film(path: Path, pictures: Iterable[np.ndarray]) -> None:
    """Writes pictures uint8 `[H, W, 3]` of one size to an h264 file, each for a while."""
    with whole_file(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=_RATE, options={"crf": "18"})
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            height, width = (size // 2 * 2 for size in picture.shape[:2])  # as the codec wants
            if not stream.codec_context.is_open:
                stream.height, stream.width = height, width
            picture = np.ascontiguousarray(picture[:height, :width])
            for _ in range(round(SECONDS_A_FRAME * _RATE)):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m zeroi2v.visualize",
        description="Pictures and a film of which frames and patches a model's heads look at.",
    )
    parser.add_argument("model", help="run folder (its best model) or model folder")
    parser.add_argument("video", help="video file")
    parser.add_argument("--out", help="folder to write to (default: attention/<name of video>)")
    parser.add_argument(
        "--layers", type=int, nargs="+", metavar="N", help="blocks, from 0 (default: the last)"
    )
    parser.add_argument(
        "--heads", type=int, nargs="+", metavar="N", help="default: the shifted; others as a mean"
    )
    parser.add_argument(
        "--query",
        help="who looks: cls or a patch as ROW,COLUMN (default: cls, or the patch in the middle of "
        "a model without class token)",
    )
    parser.add_argument("--frame", type=int, help="query frame of the still (default: the middle)")
    args = parser.parse_args(argv)

    model = load(model_folder(fetch(args.model)))
    config = model.config
    layers = [config.depth - 1] if args.layers is None else args.layers
    frame = config.num_frames // 2 if args.frame is None else args.frame
    limits = {"layers": config.depth, "heads": config.num_heads, "frame": config.num_frames}
    for name, values in (("layers", layers), ("heads", args.heads or []), ("frame", [frame])):
        for value in values:
            if not 0 <= value < limits[name]:
                raise ValueError(f"--{name} must be in 0..{limits[name] - 1}: got {value}")
    query = usual_query(config) if args.query is None else parse_query(args.query, config)
    token = token_of(query, config)
    clip = read_clip(model, args.video)
    out = Path("attention", Path(args.video).stem) if args.out is None else Path(args.out)
    out.mkdir(parents=True, exist_ok=True)

    model, video = model.to(default_device()), clip.video.to(default_device())
    maps = attention_maps(model, video, layers, token)
    with torch.no_grad():
        best = model(video).float().softmax(-1)[0].max(0)
    label = config.labels[int(best.indices)] if config.labels else f"class {int(best.indices)}"
    who = name_of(query)
    print(f"predicted    {label} ({best.values:.0%}, this clip alone)")
    for layer in layers:
        about = (
            f"{Path(args.video).name}: predicted {label} ({best.values:.0%})",
            f"layer {layer} of 0 to {config.depth - 1}; the query is {who}",
        )
        rows = rows_of(maps[layer], config.block(layer), args.heads)
        files = [out / f"layer{layer}{end}" for end in (".png", f"_frame{frame}.png", ".mp4")]
        save_picture(draw_grid(clip.images, rows, about, query), files[0])
        frames = tqdm(range(config.num_frames), f"layer {layer}", disable=None, leave=False)
        strips = (draw_strip(clip.images, rows, about, query, t) for t in frames)
        save_picture(draw_strip(clip.images, rows, about, query, frame), files[1])
        write_film(files[2], strips)
        print(f"written      {', '.join(map(str, files))}")


def usual_query(config: ModelConfig) -> tuple[int, int] | None:
    """Who looks unless told: CLS (None), or in a model without it the patch in the middle."""
    return None if config.class_token else (config.grid // 2, config.grid // 2)


def token_of(query: tuple[int, int] | None, config: ModelConfig) -> int:
    """The number of the token that is `query`: row and column of a patch, or None for CLS."""
    return 0 if query is None else config.num_prefix + query[0] * config.grid + query[1]


def name_of(query: tuple[int, int] | None) -> str:
    """Who looks, for the reader of a picture."""
    return "CLS, which the class is read from" if query is None else "the patch framed in white"


def parse_query(text: str, config: ModelConfig) -> tuple[int, int] | None:
    """`"5,8"` -> (5, 8): row and column of a patch; `"cls"` -> None. Raises ValueError."""
    if text == "cls" and config.class_token:
        return None
    parts = text.split(",")
    if len(parts) == 2 and all(part.strip().isdigit() for part in parts):
        row, column = (int(part) for part in parts)
        if max(row, column) < config.grid:
            return row, column
    allowed = "cls, or " if config.class_token else ""
    raise ValueError(f"--query must be {allowed}ROW,COLUMN in 0..{config.grid - 1}: got {text!r}")


def save_picture(picture: np.ndarray, path: Path) -> None:
    """Writes uint8 `[H, W, 3]` as a PNG that is there whole or not at all."""
    from PIL import Image

    with whole_file(path) as temporary:
        Image.fromarray(picture).save(temporary, format="png")


if __name__ == "__main__":
    sys.exit(run(main))
