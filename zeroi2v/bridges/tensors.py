"""The tensors of a foreign model as those of a VideoViT: put together, turned, resized.

Bridges rename, and `assemble` does the rest. Besides a VideoViT's own names it takes those of parts
that are put together first:

    attn.q. attn.k. attn.v.     weights and biases, or biases alone, of queries, keys and values
    mlp.gate. mlp.value.        the two halves of a SwiGLU's first layer
    ls_1, ls_2                  LayerScale after the attention and after the MLP
    pool.latent, pool.q.        the learned query of attention pooling and its projection
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zeroi2v.bridges.foreign import Foreign
from zeroi2v.config import ModelConfig

BLOCK = "transformer.resblocks.{}."


def assemble(
    kind: str,
    tensors: dict[str, Tensor],
    where: str,
    learned: Tensor | None,
    has_rows: int = 0,
    norm: str = "layer",
    all_biases: bool = False,
) -> Foreign:
    """What a bridge has renamed, with its parts put together and a bias of zeros where none is.

    Args:
        kind: the format in words.
        tensors: by the names above, without positions.
        where: file, for messages.
        learned: positional embedding `[has_rows + g*g, C]` that the source adds, or None.
        has_rows: tokens before the patches that have a row in it, the first ones.
        norm: which norm, as in `ModelConfig`.
        all_biases: whether a layer of the source without its bias is a damaged one.

    Raises ValueError if a tensor is missing or two of them contradict each other.
    """
    notes: list[str] = []
    blocks = [BLOCK.format(i) for i in _blocks(tensors, where)]
    parts = [{n.removeprefix(block) for n in tensors if n.startswith(block)} for block in blocks]
    for i, other in enumerate(parts):
        if odd := sorted(other ^ parts[0]):
            raise ValueError(f"{where}: all blocks must have the same parts: {odd[0]} of block {i}")
    for block in blocks:
        _join(tensors, f"{block}attn.in_proj_", [f"{block}attn.{part}." for part in "qkv"], where)
        halves = [f"{block}mlp.{half}." for half in ("gate", "value")]
        _join(tensors, f"{block}mlp.c_fc.", halves, where)
    _place(tensors, learned, has_rows, where)
    known = describe(tensors, where) | {"norm": norm}
    linears = ["attn.in_proj_", "attn.out_proj.", "mlp.c_fc.", "mlp.c_proj."]
    norms = ["ln_1.", "ln_2.", "attn.ln.", "mlp.ln."] if norm == "rms" else []
    places = [block + part for block in blocks for part in linears + norms]
    places += [f"pool.{part}." for part in ("key_value", "out_proj", "mlp.c_fc", "mlp.c_proj")]
    places += ["ln_pre.", "ln_post.", "ln_patch.", "pool.ln."] if norm == "rms" else []
    filled = [] if all_biases else _fill(tensors, places)
    without = {re.sub(r".*resblocks\.\d+\.", "", place).rstrip("_.") for place in filled}
    notes += [f"{part} has no bias: zeros" for part in sorted(without)]
    scaled = [
        _melt_scale(tensors, f"{block}{gamma}", f"{block}{to}.")
        for block in blocks
        for gamma, to in (("ls_1", "attn.out_proj"), ("ls_2", "mlp.c_proj"))
    ]
    if any(scaled):
        notes.append("LayerScale merged into the projections")
    if "pool.latent" in tensors:
        _project_query(tensors)
    return Foreign(format=kind, tensors=tensors, known=known, notes=notes)


def _blocks(tensors: dict[str, Tensor], where: str) -> range:
    matches = (re.match(r"transformer\.resblocks\.(\d+)\.", name) for name in tensors)
    numbers = {int(match[1]) for match in matches if match}
    if not numbers or numbers != set(range(len(numbers))):
        raise ValueError(f"{where}: blocks must be numbered from 0 on: got {sorted(numbers)[:20]}")
    return range(len(numbers))


def _join(tensors: dict[str, Tensor], whole: str, parts: list[str], where: str) -> None:
    """Stacks `parts` as the rows of `whole`; a bias that only some of them have is of zeros."""
    for kind in ("weight", "bias"):
        found = [tensors.pop(f"{part}{kind}", None) for part in parts]
        if all(tensor is None for tensor in found):
            continue
        if kind == "weight" and any(tensor is None for tensor in found):
            absent = [part for part, tensor in zip(parts, found, strict=True) if tensor is None]
            raise ValueError(f"{where} lacks {absent[0]}weight")
        like = next(tensor for tensor in found if tensor is not None)
        found = [torch.zeros_like(like) if tensor is None else tensor for tensor in found]
        tensors[f"{whole}{kind}"] = torch.cat(found)


def _place(tensors: dict[str, Tensor], learned: Tensor | None, has_rows: int, where: str) -> None:
    """Makes `positional_embedding`, which has a row for every token and the patches' bias.

    Without `learned` positions, one row stands for all patches (`resize_positions` repeats it).
    """
    if "conv1.weight" not in tensors:
        raise ValueError(f"{where} lacks conv1.weight: it is no ViT")
    width = len(tensors["conv1.weight"])
    num_prefix = _num_prefix(tensors)
    learned = torch.zeros(1, width) if learned is None else learned.float()
    if learned.ndim != 2 or learned.shape[1] != width:
        raise ValueError(
            f"{where}: positional embedding must be [tokens, {width}]: got {list(learned.shape)}"
        )
    patches = learned[has_rows:]
    if "ln_patch.weight" not in tensors and "conv1.bias" in tensors:
        patches = patches + tensors.pop("conv1.bias").float()
    without = learned.new_zeros(num_prefix - has_rows, width)
    tensors["positional_embedding"] = torch.cat([learned[:has_rows], without, patches])


def _num_prefix(tensors: dict[str, Tensor]) -> int:
    return ("class_embedding" in tensors) + len(tensors.get("register_tokens", ()))


def _fill(tensors: dict[str, Tensor], places: Iterable[str]) -> list[str]:
    """Gives those of `places` that have no bias one of zeros: the same result. Returns them."""
    filled = [p for p in places if f"{p}weight" in tensors and f"{p}bias" not in tensors]
    for place in filled:
        tensors[f"{place}bias"] = torch.zeros(len(tensors[f"{place}weight"]))
    return filled


def _melt_scale(tensors: dict[str, Tensor], gamma: str, projection: str) -> bool:
    """Multiplies LayerScale's `gamma` into the projection before it, if there is one."""
    if gamma not in tensors:
        return False
    scale = tensors.pop(gamma).double()
    for name, factor in ((f"{projection}weight", scale[:, None]), (f"{projection}bias", scale)):
        if name in tensors:  # else it is refused later
            tensors[name] = (factor * tensors[name].double()).float()
    return True


def _project_query(tensors: dict[str, Tensor]) -> None:
    """Projects the learned query of attention pooling once and for all, if it is projected."""
    query = tensors.pop("pool.latent").flatten().double()
    if (weight := tensors.pop("pool.q.weight", None)) is not None:
        query = weight.double() @ query
    if (bias := tensors.pop("pool.q.bias", None)) is not None:
        query = query + bias.double()
    tensors["pool.query"] = query.float()


def describe(tensors: dict[str, Tensor], where: str) -> dict[str, Any]:
    """The fields of `ModelConfig` that the tensors of a backbone in our names show.

    Pooling is among them only if it is by attention, the activation only if it is SwiGLU.

    Raises ValueError if a tensor is missing or two of them contradict each other.
    """
    for name in ("conv1.weight", "positional_embedding"):
        if name not in tensors:
            raise ValueError(f"{where} lacks {name}: it is no ViT")
    if "ln_post.weight" not in tensors:
        raise ValueError(f"{where} lacks a norm after the blocks, which VideoViT has")
    conv, positions = tensors["conv1.weight"], tensors["positional_embedding"]
    if conv.ndim != 4 or conv.shape[1] != 3 or conv.shape[2] != conv.shape[3]:
        raise ValueError(f"{where}: conv1.weight must be [C, 3, P, P]: got {list(conv.shape)}")
    width, patch, num_prefix = conv.shape[0], conv.shape[2], _num_prefix(tensors)
    grid = round(max(len(positions) - num_prefix, 0) ** 0.5)
    if positions.ndim != 2 or grid < 1 or grid * grid + num_prefix != len(positions):
        raise ValueError(
            f"{where}: positional_embedding must be [{num_prefix} + a square, C]: "
            f"got {list(positions.shape)}"
        )
    known = {
        "width": width,
        "patch_size": patch,
        "image_size": grid * patch,
        "depth": len(_blocks(tensors, where)),
        "rotary": None,  # unless a bridge knows better
        "ln_pre": "ln_pre.weight" in tensors,
        "norm_patches": "ln_patch.weight" in tensors,
        "norm_attended": BLOCK.format(0) + "attn.ln.weight" in tensors,
        "norm_hidden": BLOCK.format(0) + "mlp.ln.weight" in tensors,
        "class_token": "class_embedding" in tensors,
        "num_registers": len(tensors.get("register_tokens", ())),
    }
    hidden, is_gated = _mlp(tensors, f"{BLOCK.format(0)}mlp.", where)
    known["mlp_ratio"] = hidden / width
    if is_gated:
        known["activation"] = "swiglu"
    if "pool.out_proj.weight" in tensors:
        pool_hidden, pool_gated = _mlp(tensors, "pool.mlp.", where)
        if pool_gated != is_gated:
            raise ValueError(f"{where}: blocks and attention pooling must have the same MLPs")
        known |= {"pooling": "attention", "pool_mlp_ratio": pool_hidden / width}
    return known


def _mlp(tensors: dict[str, Tensor], place: str, where: str) -> tuple[int, bool]:
    """Hidden width of the MLP at `place`, and whether it is gated."""
    for name in (f"{place}c_fc.weight", f"{place}c_proj.weight"):
        if name not in tensors or tensors[name].ndim != 2:
            raise ValueError(f"{where} lacks {name}, or it is no matrix")
    rows, hidden = len(tensors[f"{place}c_fc.weight"]), tensors[f"{place}c_proj.weight"].shape[1]
    if rows not in (hidden, 2 * hidden):
        raise ValueError(f"{where}: {place}c_fc must have {hidden} rows, or twice as many: {rows}")
    return hidden, rows == 2 * hidden


def describe_clip(tensors: dict[str, Tensor], where: str) -> dict[str, Any]:
    """`describe` for CLIP's vision model, and what is always so there. Raises as that."""
    if "class_embedding" not in tensors:
        raise ValueError(f"{where} lacks class_embedding, which CLIP's vision model has")
    return describe(tensors, where) | {"norm_eps": 1e-5, "pooling": "class"}


def turn_pairs(
    foreign: Foreign, config: ModelConfig, interleaved: bool, columns_first: bool
) -> None:
    """Sorts the channels that rotary positions turn by `RotaryConfig`'s convention.

    Queries and keys alike, so their products stay as they are.

    Args:
        foreign: its `in_proj` weights and biases are replaced.
        config: settled, for the heads.
        interleaved: whether a pair's channels are neighbours, not half a head apart.
        columns_first: whether the first half of the pairs follows the column.
    """
    half = config.head_dim // 2
    pairs = torch.arange(half)
    if columns_first:
        pairs = pairs.roll(half // 2)
    order = torch.cat([2 * pairs, 2 * pairs + 1] if interleaved else [pairs, pairs + half])
    for i in range(config.depth):
        for kind in ("weight", "bias"):
            name = f"{BLOCK.format(i)}attn.in_proj_{kind}"
            query, key, value = foreign.tensors[name].chunk(3)
            turned = [
                part.unflatten(0, (config.num_heads, -1))[:, order].flatten(0, 1)
                for part in (query, key)
            ]
            foreign.tensors[name] = torch.cat([*turned, value])


def resize_positions(positions: Tensor, grid: int, num_prefix: int) -> Tensor:
    """Positional embedding `[num_prefix + g*g, C]` at another grid, bicubic.

    Rows before the patches are kept. A single patch's row is repeated, exactly.
    """
    old = round((len(positions) - num_prefix) ** 0.5)
    if old == grid:
        return positions
    prefix, patches = positions.float().tensor_split([num_prefix])
    if old == 1:
        return torch.cat([prefix, patches.expand(grid * grid, -1)])
    plane = patches.T.reshape(1, -1, old, old)
    plane = F.interpolate(plane, (grid, grid), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([prefix, plane.reshape(plane.shape[1], -1).T])
