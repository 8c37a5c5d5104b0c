"""OpenAI's CLIP: the TorchScript archives it publishes, and the state dicts made of them."""

from __future__ import annotations

from zeroi2v.bridges.foreign import Foreign
from zeroi2v.bridges.reader import Source
from zeroi2v.bridges.tensors import describe_clip

# Numbers that OpenAI's archives carry as tensors; no other library's files do.
MARKS = ("input_resolution", "context_length", "vocab_size")


def convert(source: Source) -> Foreign | None:
    """The visual tower, or None if `source` is not OpenAI's. Raises ValueError if it is unfit."""
    names = source.tensors
    if "visual.conv1.weight" not in names or not any(mark in names for mark in MARKS):
        return None
    tensors = {n.removeprefix("visual."): t for n, t in names.items() if n.startswith("visual.")}
    tensors.pop("proj", None)
    for mark in MARKS:  # scripted towers repeat them
        tensors.pop(mark, None)
    kind = "TorchScript archive" if source.scripted else "state dict"
    foreign = Foreign(format=f"OpenAI CLIP ({kind})", tensors=tensors)
    foreign.known = describe_clip(tensors, str(source.path)) | {"activation": "quick_gelu"}
    mark, size = names.get("input_resolution"), foreign.known["image_size"]
    if mark is not None and mark.tolist() != size:
        raise ValueError(
            f"{source.path}: input_resolution is {mark.tolist()}, but its positional embedding "
            f"is for {size} pixels"
        )
    width = foreign.known["width"]
    if width % 64:
        raise ValueError(f"{source.path}: width must be a multiple of 64, a head's: got {width}")
    foreign.known["num_heads"] = width // 64  # by the definition in OpenAI's code
    return foreign
