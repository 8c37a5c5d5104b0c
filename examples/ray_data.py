"""Classifies a corpus on a Ray cluster: `python examples/ray_data.py MODEL VIDEOS --out FOLDER`.

Ray Data (`pip install 'ray[data]'`) decodes on all CPU cores of the cluster while the GPUs compute,
repeats what is lost with a machine, and writes Parquet files of one row a video. Frames, views and
pixels are those of `zeroi2v predict`. In a pipeline of your own, use `Decode` and `Classify` as
`run` does.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from zeroi2v.data.annotations import Sample, read_videos
from zeroi2v.data.preprocess import normalise
from zeroi2v.data.video_files import find_videos
from zeroi2v.data.views import ViewSource
from zeroi2v.inference import default_device
from zeroi2v.storage.checkpoint import load, model_folder, read_config


class Decode:
    """For `Dataset.map`: adds the `views` of a row's `path`, and the `error` that there was.

    `views` are uint8 `[V, T, side, side, 3]`, zeros if the video can't be decoded; `error` is empty
    if it can.
    """

    def __init__(self, model: str):
        self.config = read_config(model_folder(model))

    def __call__(self, row: dict) -> dict:
        config, (clips, crops) = self.config, self.config.preprocess.test_views
        short_side, side = config.preprocess.test_short_side, config.image_size
        views = ViewSource([Sample(row["path"], 0)], short_side, crops, config, clips=clips)(0)
        if isinstance(views, str):
            nothing = np.zeros((clips * crops, config.num_frames, side, side, 3), np.uint8)
            return {**row, "views": nothing, "error": views}
        return {**row, "views": views.numpy(), "error": ""}


class Classify:
    """For `Dataset.map_batches`: `views` [B, V, T, side, side, 3] give way to the `topk` classes.

    `labels` and `probabilities` are a list in each row, from the most probable class down, and
    empty if there is an `error`. The model stays in its process, on the GPU if it has one.
    """

    def __init__(self, model: str, topk: int = 5):
        self.device = default_device()
        self.model = load(model_folder(model)).to(self.device).eval()
        config = self.model.config
        self.topk = min(topk, config.num_classes)
        self.names = config.labels or [str(i) for i in range(config.num_classes)]

    @torch.inference_mode()
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        views = torch.from_numpy(batch.pop("views")).to(self.device)
        video = normalise(views, self.model.config.preprocess).to(self.model.head.weight.dtype)
        logits = self.model(video.flatten(0, 1)).float().unflatten(0, views.shape[:2])
        best = logits.softmax(-1).mean(1).topk(self.topk)
        labels, probabilities = np.empty((2, len(views)), object)
        for i, error in enumerate(batch["error"]):
            labels[i] = [] if error else [self.names[k] for k in best.indices[i].tolist()]
            probabilities[i] = [] if error else best.values[i].tolist()
        return {**batch, "labels": labels, "probabilities": probabilities}


def run(model: str, paths: list[str], out: str, topk: int = 5, batch_size: int = 8) -> None:
    """Writes the rows of `paths` to Parquet files in folder `out`."""
    import ray

    model = str(Path(model).resolve())  # for processes in other folders
    gpus = int(ray.cluster_resources().get("GPU", 0))
    rows = ray.data.from_items([{"path": str(Path(path).resolve())} for path in paths])
    rows = rows.map(Decode(model), num_cpus=1).map_batches(
        Classify,
        fn_constructor_args=(model, topk),
        batch_size=batch_size,
        num_gpus=1 if gpus else 0,
        compute=ray.data.ActorPoolStrategy(size=max(1, gpus)),
    )
    rows.write_parquet(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="model or run folder, which all machines can read")
    parser.add_argument("videos", help="list or folder of videos, which all machines can read")
    parser.add_argument("--out", required=True, help="folder for Parquet files")
    parser.add_argument("--topk", type=int, default=5, help="classes to name (default: 5)")
    parser.add_argument("--batch-size", type=int, default=8, help="videos at once (default: 8)")
    args = parser.parse_args()
    import ray

    ray.init()
    if Path(args.videos).is_dir():
        paths, _ = find_videos([args.videos])
    else:
        paths = [sample.path for sample in read_videos(args.videos, None)]
    run(args.model, paths, args.out, args.topk, args.batch_size)


if __name__ == "__main__":
    main()
