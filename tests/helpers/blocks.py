"""Blocks with random weights, and their gradients by the training block and by autograd."""

import torch
from models import randomize
from zeroi2v_kernels.adapter_linear import Dropout, dropout_mask

from zeroi2v.config import ModelConfig
from zeroi2v.model.training_block import can_train
from zeroi2v.model.vit import Block

POLICIES = ("save", "lean", "recompute")


def build_block(config: ModelConfig, seed: int = 0) -> Block:
    """A frozen block with random weights, adapters trainable, in training mode."""
    block = randomize(Block(config), seed)
    for name, parameter in block.named_parameters():
        parameter.requires_grad = "_adapter." in name
    block.memory = "save"
    return block


def tokens(config, dtype=torch.float64, batch: int = 2, device="cpu") -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (batch, config.num_frames, config.num_tokens, config.width)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x.to(device, dtype).requires_grad_()


def drawn_masks(block: Block, x: torch.Tensor, cls_only: bool, seed: int) -> list[torch.Tensor]:
    """The dropout masks that the training block draws after `torch.manual_seed(seed)`."""
    torch.manual_seed(seed)
    drawn = torch.randint(2**62, (), device=x.device)
    adapter, masks = block.attn.in_adapter, []
    for place in range(4):
        shape = [*x.shape[:3], adapter.down.out_features]
        if cls_only and place:
            shape[2] = 1
        like = x.new_empty(shape).flatten(0, 2)
        masks.append(dropout_mask(like, Dropout(adapter.dropout.p, drawn, place)).view(shape))
    return masks


def value_and_grads(out, inputs, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
    return [out.detach(), *torch.autograd.grad(out, inputs, weight)]


def trained(block: Block) -> list[torch.Tensor]:
    return [p for p in block.parameters() if p.requires_grad]


def assert_close(actual, expected, relative: float) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert (a - b).abs().max() <= relative * b.abs().max()


def run(block, x, cls_only, memory, seed=0):
    """Output of the training block, the gradient of x and those of the adapters."""
    block.memory = memory
    torch.manual_seed(seed)
    assert can_train(block, x)
    return value_and_grads(block(x, cls_only), [x, *trained(block)])
