"""Rows with outliers, and faults that a model with 8-bit weights may have."""

import torch


def rows(count=6, width=64, outlier=100.0):
    """Rows of very different size, with two channels of outliers."""
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(0))
    x[:, [3, 40]] *= outlier
    return x * 4.0 ** -torch.arange(count)[:, None]


def no_split(model):
    """The keys' and values' rows with the scales of others."""
    for block in model.transformer.resblocks:
        scale = block.attn.in_proj_weight_scale
        scale.copy_(scale.roll(48))
    return model


def lost_bias(model):
    model.transformer.resblocks[2].mlp.c_fc.bias.zero_()
    return model
