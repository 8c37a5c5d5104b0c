"""Mixup and cutmix against their definitions; who is mixed with whom depends on nothing else."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loading import AUGMENT, assert_same, config

from zeroi2v.data.augment import AugmentConfig
from zeroi2v.data.mixing import draw_box, mix
from zeroi2v.data.pipeline import ClipLoader

pytestmark = pytest.mark.usefixtures("forked_workers")

LABEL = torch.tensor([3, 1, 4, 1])


def mixed(augment, position=0, key=(0, 0)):
    """Random clips before and after mixing, and their targets."""
    video = torch.rand(4, 1, 3, 2, 20, 30, generator=torch.Generator().manual_seed(0))
    before = video.clone()
    return before, video, mix(video, LABEL, augment, key, position, num_classes=5)


def test_mixup_blends_both_clips_of_a_pair_and_their_classes_in_the_same_shares():
    shares = []
    for position in range(0, 40, 4):
        before, after, target = mixed(AugmentConfig(mixup=0.8), position)
        for one, other in ((0, 1), (1, 0), (2, 3), (3, 2)):
            share = 1 - target[one, LABEL[other]]
            torch.testing.assert_close(
                after[one], share * before[one] + (1 - share) * before[other]
            )
            assert target[one].sum() == 1 and (target[one] > 0).sum() <= 2
            shares.append(float(share))
    assert min(shares) < 0.2 and max(shares) > 0.8 and len(set(shares)) > 15


def test_cutmix_swaps_one_rectangle_of_all_frames_and_shares_classes_by_its_area():
    areas = []
    for position in range(0, 40, 4):
        before, after, target = mixed(AugmentConfig(cutmix=1.0), position)
        for one, other in ((0, 1), (1, 0), (2, 3), (3, 2)):
            swapped = (after[one] == before[other]).flatten(0, -3).all(dim=0)
            kept = (after[one] == before[one]).flatten(0, -3).all(dim=0)
            assert (swapped ^ kept).all()
            rows, columns = swapped.any(dim=1), swapped.any(dim=0)
            assert swapped.sum() == rows.sum() * columns.sum()
            assert target[one, LABEL[other]] == pytest.approx(float(swapped.float().mean()))
            assert target[one, LABEL[one]] == pytest.approx(float(kept.float().mean()))
            areas.append(float(swapped.float().mean()))
    assert min(areas) < 0.1 and max(areas) > 0.5


def test_boxes_have_the_shape_of_the_frame_and_lie_anywhere():
    rng = np.random.default_rng(0)
    boxes = np.array([draw_box(rng, 100, 200, 1.0) for _ in range(2000)])
    top, left, bottom, right = boxes.T
    assert (0 <= top).all() and (top <= bottom).all() and (bottom <= 100).all()
    assert (0 <= left).all() and (left <= right).all() and (right <= 200).all()
    inside = (top > 0) & (left > 0) & (bottom < 100) & (right < 200)
    assert inside.sum() > 100
    assert np.abs(2 * (bottom - top) - (right - left))[inside].max() <= 2
    assert top.min() == 0 and right.max() == 200


def test_a_coin_decides_between_the_two():
    kinds = []
    for position in range(0, 400, 4):
        before, after, _ = mixed(AugmentConfig(mixup=1.0, cutmix=1.0), position)
        kinds += [bool((after[i] == before[i]).any()) for i in (0, 2)]
    assert 70 < sum(kinds) < 130


def test_a_mixture_of_one_class_is_that_class():
    video = torch.rand(2, 1, 3, 1, 8, 8)
    target = mix(video, torch.tensor([2, 2]), AugmentConfig(mixup=1.0), (0, 0), 0, 3)
    assert torch.equal(target, torch.tensor([[0.0, 0, 1], [0, 0, 1]]))


def test_loss_of_a_mixture_is_the_mixed_loss_label_smoothing_included():
    _, _, target = mixed(AugmentConfig(mixup=0.8))
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    loss = F.cross_entropy(logits, target, label_smoothing=0.1)
    partner = LABEL[[1, 0, 3, 2]]
    share = 1 - target[torch.arange(4), partner]
    one, other = (
        F.cross_entropy(logits, label, label_smoothing=0.1, reduction="none")
        for label in (LABEL, partner)
    )
    torch.testing.assert_close(loss, (share * one + (1 - share) * other).mean())


# In the loader


@pytest.mark.parametrize("kind", [dict(mixup=0.8), dict(cutmix=1.0), dict(mixup=0.2, cutmix=0.5)])
def test_mixtures_are_of_the_clips_of_the_same_loader_without(samples, kind):
    augment = dataclasses.replace(AUGMENT, **kind)
    plain = list(ClipLoader(samples, config(), batch_size=4, augment=AUGMENT, seed=1).epoch(2))
    both = list(ClipLoader(samples, config(), batch_size=4, augment=augment, seed=1).epoch(2))
    for step, (before, after) in enumerate(zip(plain, both, strict=True)):
        assert torch.equal(before.index, after.index) and torch.equal(before.label, after.label)
        assert torch.equal(before.target, before.label)
        video = before.video.clone()
        target = mix(video, before.label, augment, (1, 2), 4 * step, 10)
        assert torch.equal(after.video, video) and torch.equal(after.target, target)
        assert after.target.dtype == torch.float32 and after.target.shape == (4, 10)


def test_mixtures_depend_neither_on_processes_nor_workers_and_resume(samples):
    augment = dataclasses.replace(AUGMENT, mixup=0.5, cutmix=0.5)

    def rows(batch_size, world_size=1, accumulation=1, workers=0, start_step=0):
        loaders = [
            ClipLoader(
                samples,
                config(),
                batch_size=batch_size,
                rank=rank,
                world_size=world_size,
                accumulation=accumulation,
                workers=workers,
                augment=augment,
                seed=3,
            )
            for rank in range(world_size)
        ]
        per_rank = [list(loader.epoch(1, start_step)) for loader in loaders]
        return [batch for batches in zip(*per_rank, strict=True) for batch in batches]

    whole = rows(4)
    for split in (rows(2, world_size=2), rows(2, accumulation=2)):
        for name in ("video", "target", "index"):
            ours, theirs = (torch.cat([getattr(b, name) for b in x]) for x in (whole, split))
            assert torch.equal(ours, theirs), name
    assert_same(rows(4, workers=2), whole)
    assert_same(rows(4, start_step=2), whole[2:])


def test_mixing_needs_pairs_and_shares(samples):
    with pytest.raises(ValueError, match="batch_size must be even with mixup or cutmix: got 3"):
        ClipLoader(samples, config(), batch_size=3, augment=AugmentConfig(mixup=0.1))
    for name in ("mixup", "cutmix"):
        with pytest.raises(ValueError, match=f"augment.{name} must be at least 0: got -1"):
            AugmentConfig(**{name: -1})
    assert not AugmentConfig().mixes
