"""The DALI graph: from what a worker hands over (`clip_worker.py`) to normalised clips.

The same operators on both devices; pixels stay uint8 until the last kernel.
"""

from __future__ import annotations

import numpy as np
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.auto_aug import augmentations
from nvidia.dali.auto_aug.core import select
from nvidia.dali.pipeline import do_not_convert

from zeroi2v.data.augment import KINDS
from zeroi2v.data.clip_worker import PREFETCH, ClipPlan, ClipSource

_DTYPES = {
    np.uint8: types.UINT8, np.int32: types.INT32, np.float32: types.FLOAT, np.bool_: types.BOOL,
}  # fmt: skip
_GREY = 128  # fills what an operation uncovers or erases, as published


@pipeline_def(enable_conditionals=True)
def clip_graph(source: ClipSource, plan: ClipPlan, gpu: bool, parallel: bool):
    """Outputs the reports of `source`, and clips float32 [3, T, H, W]."""
    config, augment = plan.config, plan.augment
    workers = {}
    if parallel:
        workers = dict(
            parallel=True,
            prefetch_queue_depth=PREFETCH,
            bytes_per_sample_hint=plan.clip_bytes,  # what is larger makes DALI's memory grow
        )
    names = list(plan.arrays)
    outputs = fn.external_source(
        source,
        num_outputs=len(names),
        layout=["FHWC" if name == "frames" else "" for name in names],
        dtype=[_DTYPES[dtype] for dtype in plan.arrays.values()],
        batch=False,
        **workers,
    )
    given = {name: outputs[i] for i, name in enumerate(names)}
    frames, geometry = given["frames"], given["geometry"]
    if gpu:
        frames = frames.gpu()
    if plan.cutter is not None:
        cut = [given[name] for name in ("data", "picks", "colours", "box")]
        is_cut = given["is_cut"]
        if is_cut:  # noqa: SIM108, for DALI splits the batch at a statement
            frames = _decode(*cut, gpu)
        else:
            frames = _identity(frames)
    size = fn.cast(geometry[0], dtype=types.FLOAT)
    process = config.preprocess
    kind = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}[process.interpolation]
    frames = fn.resize(frames, size=size, interp_type=kind, antialias=process.antialias)
    mirror = 0
    if augment:
        mirror = given["mirror"]
        if augment.rand_augment_ops:
            for i in range(augment.rand_augment_ops):
                frames = _rand_augment(frames, given["ops"][i], gpu)
        if augment.erasing:
            corner, shape = given["erasing"][0], given["erasing"][1]
            frames = fn.erase(frames, anchor=corner, shape=shape, axis_names="HW", fill_value=_GREY)
    frames = fn.slice(frames, geometry[1], [config.image_size] * 2, axis_names="HW")
    clips = fn.crop_mirror_normalize(
        frames,
        mirror=mirror,
        mean=list(process.mean),
        std=list(process.std),
        output_layout="CFHW",
        dtype=types.FLOAT,
    )
    return given["report"], clips


def _decode(data, picks, colours, box, gpu: bool):
    """The rectangle `box` of the frames `picks` of the video file `data`, in right colours."""
    # By default what lies past the end is black, and all processes' threads share the first cores.
    device = "mixed" if gpu else "cpu"
    frames = fn.decoders.video(data, frames=picks, device=device, pad_mode="edge", affine=False)
    frames = fn.slice(frames, box[0], box[1], axis_names="HW")
    return fn.coord_transform(frames, M=colours, dtype=types.UINT8)


def _rand_augment(frames, op, gpu: bool):
    """Applies to each clip the one operation that its row of numbers asks for."""
    kind, value = fn.cast(op[0], dtype=types.INT32), op[1]
    matrix = fn.reshape(op[2:8], shape=[2, 3])
    # Not another `op[1]`: DALI merges equal nodes, and loses one that is moved to the GPU as well.
    operand, kernel = value, fn.reshape(op[2:11], shape=[3, 3])
    if gpu:
        operand, kernel = operand.gpu(), kernel.gpu()
    # None branches by sample, and DALI takes seconds to find that out.
    choices = [do_not_convert(globals()[f"_{name}"]) for name in KINDS]
    return select(choices, kind, frames, value, matrix, operand, kernel)


# One function for each of KINDS; `value` and `operand` are the same number, the second on the
# device of the frames. Statistics (contrast, equalize, auto_contrast) are taken frame by frame.
def _identity(frames, *_):
    return frames


def _affine(frames, value, matrix, operand, kernel):
    return fn.warp_affine(frames, matrix=matrix, fill_value=_GREY)


def _brightness(frames, value, matrix, operand, kernel):
    return fn.brightness(frames, brightness=value)


def _contrast(frames, value, matrix, operand, kernel):
    return augmentations.contrast.op(frames, operand)


def _color(frames, value, matrix, operand, kernel):
    return fn.saturation(frames, saturation=value)


def _sharpness(frames, value, matrix, operand, kernel):
    return fn.filter(frames, kernel)


def _posterize(frames, value, matrix, operand, kernel):
    return frames & fn.cast(operand, dtype=types.UINT8)


def _solarize(frames, value, matrix, operand, kernel):
    return augmentations.solarize.op(frames, operand)


def _equalize(frames, value, matrix, operand, kernel):
    return fn.equalize(frames)


def _auto_contrast(frames, value, matrix, operand, kernel):
    return augmentations.auto_contrast.op(frames, None)


def _invert(frames, value, matrix, operand, kernel):
    return augmentations.invert.op(frames, None)
