"""Lists of samples that workers map instead of copying."""

import gc
import os
import pickle
import tempfile

import pytest
from loading import config

from zeroi2v.data.annotations import Sample
from zeroi2v.data.pipeline import ClipLoader, ClipSource
from zeroi2v.data.shared_samples import SharedSamples
from zeroi2v.data.views import ViewLoader

pytestmark = pytest.mark.usefixtures("forked_workers")

KINDS = [
    Sample("a b/ü\u2028.mp4", 3),
    Sample("/x.mp4", 0, 0.1, 1e-3 + 2),
    Sample("images", -1, span=(2, 9), filename_tmpl="img_{:05}.jpg"),
    Sample("", 2**40, frames=7),
]


def test_samples_come_back_as_they_were(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    shared = SharedSamples(KINDS * 3)
    other = pickle.loads(pickle.dumps(shared))
    for samples in (other, shared):
        assert list(samples) == KINDS * 3 and len(samples) == 12
        assert samples[-1] == KINDS[-1]
        with pytest.raises(IndexError):
            samples[12]
    assert len(os.listdir(tmp_path)) == 1
    del shared, samples
    gc.collect()
    assert not os.listdir(tmp_path)


def test_a_worker_is_sent_the_name_of_a_file():
    """The rows themselves would be 5 MB here, and 444 in the memory of each worker at a million."""
    samples = [Sample(f"/data/videos/some_class/video_{i:08}.mp4", i % 400) for i in range(50_000)]
    loader = ClipLoader(samples, config(), batch_size=2, workers=2)
    views = ViewLoader(samples, config(), batch_size=2, workers=2)
    for source in (ClipSource(loader.plan, 0, 0), views._source):
        data = pickle.dumps(source)
        assert len(data) < 4096
    assert loader.plan.samples[49_999] == views._source.samples[49_999] == samples[-1]
