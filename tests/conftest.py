"""Fixtures shared by the tests."""

import gc
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from interpreter import make_quick

if not torch.cuda.is_available():  # kernels run in Triton's interpreter; it reads this at import
    os.environ.setdefault("TRITON_INTERPRET", "1")
    make_quick()


@pytest.fixture(autouse=True, scope="module")
def only_new_garbage():
    """The modules that tests import make a million objects: each collection went through them all.

    PyTorch and DeepSpeed collect garbage many times. What is there before a file's tests stays.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_lasting_linear(monkeypatch):
    """DeepSpeed's stage 3 puts another F.linear in its place for good: it rounds differently."""
    monkeypatch.setattr(F, "linear", F.linear)


@pytest.fixture(scope="session")
def clips() -> Path:
    """Folder of real, damaged and re-encoded video files; tests that need it skip without it."""
    places = [Path(__file__).parents[2] / "shared" / "clips"]
    if "ZEROI2V_CLIPS" in os.environ:
        places.insert(0, Path(os.environ["ZEROI2V_CLIPS"]))
    for place in places:
        if (place / "manifest.tsv").is_file():
            return place
    pytest.skip("no clips: set ZEROI2V_CLIPS or place them in ../shared/clips")
