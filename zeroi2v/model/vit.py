"""VideoViT: an image transformer that reads video. Readable from top to bottom.

Every frame is a row of patch tokens, in most families after a CLS token and registers. All layers
work within frames, except the attention heads that read a neighbouring frame's keys and values
(`attention.py`). With `adapter=None` and zero offsets it is the plain image ViT, applied to each
frame.

Shapes: B clips, T frames, N tokens a frame (CLS the first, if there is one), C channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from huggingface_hub import ModelHubMixin
from torch import Tensor, nn
from zeroi2v_kernels import choice
from zeroi2v_kernels.activation_reference import activate

from zeroi2v.config import AdapterConfig, ModelConfig
from zeroi2v.model.adapter import LinearAdapter
from zeroi2v.model.attention import STDHA
from zeroi2v.model.graphs import Graphs, can_replay
from zeroi2v.model.linear import Linear, ScaledLinear
from zeroi2v.model.norm import Norm
from zeroi2v.model.quantization import FORMATS, Format
from zeroi2v.model.training_block import Memory, can_train, training_block


class VideoViT(nn.Module, ModelHubMixin):
    """Classifies clips of `config.num_frames` frames.

    Parameters have OpenAI CLIP's visual names, plus `temporal_embedding`, `head` and, while
    training, the adapters; other families' parts follow `ModelConfig`. All linear layers and norms
    have biases, zeros where the source has none, and `positional_embedding` includes the bias that
    others add to patches, except where these are normed first.

    Source: ZeroI2V (arXiv 2310.01324), section 3; CLIP (arXiv 2103.00020).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.origins: dict[str, str] = {}
        """JSON texts by file name (`model_card.ORIGINS`) that are saved with it."""
        self.graphs: Graphs | None = None  # chosen by `accelerate`
        width = config.width
        self.conv1 = PatchEmbedding(width, config.patch_size, bias=config.norm_patches)
        self.ln_patch = Norm(width, config) if config.norm_patches else None
        if config.class_token:
            self.class_embedding = nn.Parameter(torch.empty(width))
        if config.num_registers:
            self.register_tokens = nn.Parameter(torch.empty(config.num_registers, width))
        self.positional_embedding = nn.Parameter(torch.empty(config.num_tokens, width))
        self.temporal_embedding = nn.Parameter(torch.zeros(config.num_frames, width))
        self.ln_pre = Norm(width, config) if config.ln_pre else nn.Identity()
        self.transformer = Transformer(config)
        self.ln_post = Norm(width, config)
        self.pool = AttentionPool(config) if config.pooling == "attention" else None
        self.dropout = nn.Dropout(config.head_dropout)
        self.head = nn.Linear(width, config.num_classes)
        self._init_weights()

    def forward(self, video: Tensor, is_tokens: bool = False) -> Tensor:
        """Normalised `video [B, 3, T, H, W]` -> logits `[B, num_classes]`.

        With `is_tokens` it is what `image_tokens` made of a video, `[B, T, N, C]`. Raises
        ValueError for another shape than the model's.
        """
        if is_tokens:
            shape = [self.config.num_frames, self.config.num_tokens, self.config.width]
            if video.ndim != 4 or list(video.shape[1:]) != shape:
                expected = ", ".join(map(str, shape))
                raise ValueError(f"tokens must be [B, {expected}]: got {list(video.shape)}")
            return self._classify(self._read(video))
        if self.graphs is None:
            return self._logits(video)
        return self.graphs(self, self._logits, video)

    def _logits(self, video: Tensor) -> Tensor:
        return self._classify(self.features(video))

    def _classify(self, features: Tensor) -> Tensor:
        return self.head(self.dropout(features.mean(dim=1)))

    def features(self, video: Tensor) -> Tensor:
        """Normalised `video [B, 3, T, H, W]` -> what stands for each frame, `[B, T, C]`.

        That is the CLS token, or with other pooling what is read from all tokens. If only CLS is
        read, the last block computes the rest of the way for CLS alone.
        """
        return self._read(self.image_tokens(video))

    def tokens(self, video: Tensor) -> Tensor:
        """Normalised `video [B, 3, T, H, W]` -> all tokens of the last block, `[B, T, N, C]`."""
        return self._adapted(self.image_tokens(video), cls_only=False)

    def image_tokens(self, video: Tensor) -> Tensor:
        """Normalised `video [B, 3, T, H, W]` -> the first adapted block's input, `[B, T, N, C]`.

        If there are blocks before that one, its temporal embedding is still to be added. These know
        nothing of other frames; where they are frozen, autograd does not follow them.
        """
        if torch.is_grad_enabled() and self._has_frozen_start(video):
            with torch.no_grad():
                return self.image_tokens(video)
        x = self.embed(video)
        for block in self.transformer.resblocks[: self.config.adapt_from]:
            x = block(x)
        return x

    def _has_frozen_start(self, video: Tensor) -> bool:
        """Whether there are blocks before the adapted ones, and nothing until then is trained."""
        if not self.config.adapt_from or video.requires_grad:
            return False
        return not any(p.requires_grad for _, p in self.image_parameters())

    def image_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and values of what `image_tokens` reads, but for a temporal embedding."""
        for name, parameter in self.named_parameters(recurse=False):
            if name != "temporal_embedding":
                yield name, parameter
        for name in ("conv1", "ln_patch", "ln_pre"):
            if (part := getattr(self, name)) is not None:
                yield from part.named_parameters(name)
        for number, block in enumerate(self.transformer.resblocks[: self.config.adapt_from]):
            yield from block.named_parameters(f"transformer.resblocks.{number}")

    def _adapted(self, x: Tensor, cls_only: bool) -> Tensor:
        """The last block's output of `x`, which is as from `image_tokens`."""
        first = self.config.adapt_from
        return self.transformer(self.timed(x) if first else x, first, cls_only)

    def _read(self, x: Tensor) -> Tensor:
        """`features` of what `image_tokens` gave."""
        reads_class = self.config.reads_class
        x = self.ln_post(self._adapted(x, cls_only=reads_class))
        if reads_class:
            return x.squeeze(2)
        return self.pool(x) if self.pool else x[:, :, self.config.num_prefix :].mean(2)

    def timed(self, x: Tensor) -> Tensor:
        """`x [B, T, N, C]` with the temporal embedding of each frame added."""
        return x + self.temporal_embedding.to(x.dtype).unsqueeze(1)

    def embed(self, video: Tensor) -> Tensor:
        """`video [B, 3, T, H, W]` -> the first block's input, `[B, T, N, C]`.

        Raises ValueError for a video of another shape than the model's.
        """
        size, frames = self.config.image_size, self.config.num_frames
        if video.ndim != 5 or video.shape[1:] != (3, frames, size, size):
            raise ValueError(
                f"video must be [B, 3, {frames}, {size}, {size}]: got {list(video.shape)}"
            )
        x = self.conv1(video.to(self.conv1.weight.dtype))
        x = self.ln_patch(x) if self.ln_patch else x
        for name in ("register_tokens", "class_embedding"):
            if (tokens := getattr(self, name, None)) is not None:
                tokens = tokens.to(x.dtype).expand(*x.shape[:2], tokens.numel() // x.shape[-1], -1)
                x = torch.cat([tokens, x], dim=2)
        x = x + self.positional_embedding.to(x.dtype)
        return self.ln_pre(x if self.config.adapt_from else self.timed(x))

    @property
    def quantization(self) -> Format | None:
        """How the blocks keep weights in 8 bits, for inference alone (`quantization.py`)."""
        return FORMATS.get(self.transformer.resblocks[0].attn.in_proj_weight.dtype)

    def freeze(self) -> VideoViT:
        """Leaves the adapters, `temporal_embedding`, `ln_post` and `head` trainable, no others.

        From now on blocks are differentiated by the training block (`set_memory`). Raises
        ValueError for 8-bit weights.
        """
        self._check_trainable()
        for name, parameter in self.named_parameters():
            top = name.split(".")[0]
            parameter.requires_grad = (
                top in ("temporal_embedding", "ln_post", "head") or "_adapter." in name
            )
        for block in self.transformer.resblocks:
            block.memory = block.memory or "save"
        return self

    def set_memory(self, memory: Memory) -> VideoViT:
        """Chooses what a block keeps for backward: much, `save`; `lean`; or little, `recompute`.

        The block is then `training_block.py`, as long as its backbone is frozen. Raises ValueError
        for other policies, and for 8-bit weights.
        """
        self._check_trainable()
        if memory not in get_args(Memory):
            raise ValueError(f"memory must be one of {', '.join(get_args(Memory))}: got {memory!r}")
        for block in self.transformer.resblocks:
            block.memory = memory
        return self

    def _check_trainable(self) -> None:
        if (held := self.quantization) is not None:
            rule = "must have wide weights to be trained"
            raise ValueError(f"model {rule}: its blocks have {held.title}")

    def accelerate(self, *batches: int) -> VideoViT:
        """Has inference on a GPU launched as CUDA graphs: few clips then don't wait for the host.

        Results are the same, in memory of the caller's own. A number of clips that comes for the
        second time is captured, which takes about as long as three passes; those in `batches` are
        captured now, if the model is on a GPU and in eval mode. The graphs of the last few numbers
        are kept, with the memory of one pass, and captured anew after weights were moved, recast or
        replaced or the model was changed. Weights may be changed in place.

        It runs op by op, as without, on a CPU; in training mode; where gradients are wanted (use
        `torch.no_grad()`, or a model without `requires_grad`); under autocast; with hooks; while it
        is traced, compiled or captured; and after a capture has failed, which is logged. While
        it captures, no other thread may synchronise the GPU.
        """
        self.graphs = self.graphs or Graphs()
        size, frames = self.config.image_size, self.config.num_frames
        for clips in batches:
            video = self.conv1.weight.new_zeros(clips, 3, frames, size, size)
            with torch.no_grad():
                if can_replay(self, video):
                    self.graphs(self, self._logits, video, recurs=True)
        return self

    @classmethod
    def from_pretrained(cls, folder: str | Path, **download) -> VideoViT:
        """The model saved in `folder`, or of that name on the Hugging Face hub, in eval mode.

        The network is used only for `owner/model` of which nothing exists here; `download`
        (`revision`, `token`, `cache_dir`, `local_files_only`, …) goes to the hub's client.
        Raises ValueError or OSError if unfit.
        """
        from zeroi2v.storage.checkpoint import fetch, load

        return load(fetch(folder, **download))

    def save_pretrained(self, folder: str | Path, **_hub) -> None:
        """Writes `config.json`, `model.safetensors` and a model card to `folder`.

        What `push_to_hub` adds to the arguments (config, card) is in the model already.
        """
        from zeroi2v.storage.checkpoint import save

        save(self, folder)

    def _init_weights(self) -> None:
        if self.head.weight.is_meta:
            return  # weights will be read; drawing them there would import a compiler for seconds
        width = self.config.width
        for module in self.modules():
            if isinstance(module, STDHA):
                nn.init.normal_(module.in_proj_weight, std=width**-0.5)
        for name, parameter in self.named_parameters(recurse=False):
            if name != "temporal_embedding":
                nn.init.normal_(parameter, std=width**-0.5)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)


class PatchEmbedding(nn.Conv2d):
    """A linear layer on the pixels of each patch, which CLIP writes as a convolution.

    On CUDA it is the matrix product that it stands for: cuDNN takes several times as long, and in
    float32 multiplies in TF32 unless told otherwise.
    """

    def __init__(self, width: int, patch_size: int, bias: bool = False):
        super().__init__(3, width, kernel_size=patch_size, stride=patch_size, bias=bias)

    def forward(self, video: Tensor) -> Tensor:
        """`[B, 3, T, H, W]` -> `[B, T, H/P W/P, C]`."""
        if choice.patches_by_product(video):
            patch, pattern = self.kernel_size[0], "b c t (h p) (w q) -> b t (h w) (c p q)"
            patches = rearrange(video, pattern, p=patch, q=patch)
            return F.linear(patches, self.weight.flatten(1), self.bias)
        images = rearrange(video, "b c t h w -> (b t) c h w")
        return rearrange(super().forward(images), "(b t) c h w -> b t (h w) c", t=video.shape[2])


class Transformer(nn.Module):
    """The stack of blocks, called `transformer.resblocks` in CLIP's checkpoints."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        blocks = (Block(config.block(number)) for number in range(config.depth))
        self.resblocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, first: int = 0, cls_only: bool = False) -> Tensor:
        """`x [B, T, N, C]`, the input of block `first` -> `[B, T, N, C]` of the last block, or
        `[B, T, 1, C]` if only CLS is asked for."""
        for block in self.resblocks[first:-1]:
            x = block(x)
        return self.resblocks[-1](x, cls_only)


class Block(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.ln_1 = Norm(config.width, config)
        self.attn = STDHA(config)
        self.ln_2 = Norm(config.width, config)
        self.mlp = MLP(config, config.hidden, config.adapter)
        self.memory: Memory | None = None  # chosen by `freeze` or `set_memory`

    def forward(self, x: Tensor, cls_only: bool = False) -> Tensor:
        """`x [B, T, N, C]` -> `[B, T, N, C]`, or `[B, T, 1, C]` for the CLS token alone."""
        if self.memory and can_train(self, x):  # the same arithmetic, which keeps less for backward
            return training_block(self, x, cls_only)
        attended = self.attn(self.ln_1(x), cls_only)
        normed, x = self.ln_2.of_sum(x[:, :, :1] if cls_only else x, attended)
        return x + self.mlp(normed)


class MLP(nn.Module):
    """Two linear layers with an activation between them, each beside its adapter while training.

    QuickGELU, z * sigmoid(1.702 z), is computed as silu(1.702 z) / 1.702: one pass instead of
    three, and both factors ride on the matrix products around it. On CUDA one kernel adds the bias
    and applies the activation.
    """

    def __init__(self, config: ModelConfig, hidden: int, adapter: AdapterConfig | None):
        super().__init__()
        width = config.width
        self.activation = config.activation
        self.c_fc = ScaledLinear(width, hidden * (2 if config.activation == "swiglu" else 1))
        self.ln = Norm(hidden, config) if config.norm_hidden else None
        self.c_proj = ScaledLinear(hidden, width)
        scales = config.activation == "quick_gelu" and not config.norm_hidden
        self.activation_scale = 1.702 if scales else None
        if adapter:
            self.in_adapter = LinearAdapter(width, config.adapter_rank, adapter)
            self.out_adapter = LinearAdapter(width, config.adapter_rank, adapter)
        else:
            self.in_adapter = self.out_adapter = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """`[..., C]` -> `[..., C]`."""
        x = self.in_adapter(x)
        if choice.uses_kernels(x):
            from zeroi2v_kernels.activation import bias_activation

            hidden = self.c_fc.without_bias(x)
            hidden = bias_activation(hidden, self.c_fc.bias, self.activation)
        elif self.activation_scale is None:
            hidden = activate(self.c_fc(x), self.activation)
        else:
            scale = self.activation_scale
            hidden = self.c_fc(x, input_scale=scale, bias_scale=scale)
            # Without autograd the activation is written over its input.
            hidden = F.silu(hidden, inplace=not torch.is_grad_enabled())
            return self.out_adapter(self.c_proj(hidden, input_scale=1 / scale))
        return self.out_adapter(self.c_proj(self.ln(hidden) if self.ln else hidden))


class AttentionPool(nn.Module):
    """What one learned query reads from all tokens of a frame, and an MLP beside it.

    The query is kept as it is after its projection, which for a learned one changes nothing.

    Source: SigLIP (arXiv 2303.15343), whose head is that of Set Transformer (arXiv 1810.00825).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        width = config.width
        self.num_heads = config.pool_heads
        self.query = nn.Parameter(torch.zeros(width))
        self.key_value = Linear(width, 2 * width)
        self.out_proj = Linear(width, width)
        self.ln = Norm(width, config)
        self.mlp = MLP(config, round(width * config.pool_mlp_ratio), adapter=None)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, N, C]` -> `[B, T, C]`."""
        frames = x.flatten(0, 1)  # attention of 4 dimensions has kernels on a GPU, and is in ONNX
        key_value = self.key_value(frames).unflatten(-1, (2, self.num_heads, -1))
        query = self.query.to(x.dtype).view(self.num_heads, 1, -1)
        # A copy, in memory that is aligned alike wherever the weights were loaded to: equal bits.
        query = query.repeat(frames.shape[0], 1, 1, 1)  # [B*T, H, 1, D]
        key, value = key_value.permute(2, 0, 3, 1, 4)  # [B*T, H, N, D] each
        read = F.scaled_dot_product_attention(query, key, value).flatten(1)
        x = self.out_proj(read).unflatten(0, (-1, x.shape[1]))
        return x + self.mlp(self.ln(x))
