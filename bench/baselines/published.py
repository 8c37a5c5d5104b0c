"""Published accuracies and costs of CLIP image ViTs adapted to video.

Nothing here was measured by this project. ZeroI2V's case is cost, not the top accuracy: AIM and
DiST reach more on the same backbone, at a higher cost for each clip.
"""

from __future__ import annotations

from typing import NamedTuple


class Published(NamedTuple):
    """One line of a paper's table."""

    method: str
    backbone: str
    dataset: str
    frames: int | None
    """Frames of a clip; None if our source does not say."""
    top1: float
    """Accuracy in per cent."""
    gmacs: float | None
    """10^9 multiply-adds of all views together (papers print them as GFLOPs); None if unknown."""
    source: str


_ZEROI2V = "ZeroI2V, arXiv 2310.01324"
_AIM = "AIM, arXiv 2302.03024"
_ST_ADAPTER = "ST-Adapter, arXiv 2206.13559"
_EVL = "github.com/OpenGVLab/efficient-video-recognition"
_DIST = "DiST, arXiv 2309.07911"
_V_JEPA_2 = "V-JEPA 2, arXiv 2506.09985"

PUBLISHED = (
    Published("ZeroI2V", "B/16", "K400", 8, 83.0, 422, _ZEROI2V),
    Published("ZeroI2V", "L/14", "K400", 8, 86.3, None, _ZEROI2V),
    Published("ZeroI2V", "L/14", "K400", 32, 87.2, 7783, _ZEROI2V),
    Published("ZeroI2V", "B/16", "SSv2", 16, 67.7, None, _ZEROI2V),
    Published("ZeroI2V", "L/14", "SSv2", 32, 72.2, None, _ZEROI2V),
    Published("AIM", "B/16", "K400", 8, 83.9, 606, _AIM),
    Published("AIM", "L/14", "K400", 32, 87.5, 11208, _AIM),
    Published("ST-Adapter", "B/16", "K400", None, 82.7, None, _ST_ADAPTER),
    Published("ST-Adapter", "L/14", "SSv2", None, 72.3, None, _ST_ADAPTER),
    Published("EVL", "B/16", "K400", 8, 82.9, None, _EVL),
    Published("EVL", "L/14", "K400", 8, 86.3, None, _EVL),
    Published("EVL", "L/14", "K400", 32, 87.3, None, _EVL),
    Published("DiST", "B/16", "K400", None, 83.6, None, _DIST),
    Published("DiST", "L/14", "K400", None, 88.0, None, _DIST),
    Published("DiST", "L/14", "SSv2", None, 73.1, None, _DIST),
    Published("V-JEPA 2, frozen, probe", "ViT-L", "SSv2", None, 73.7, None, _V_JEPA_2),
)
