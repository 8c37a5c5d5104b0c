"""What runs in processes of their own would each do first: imported by the one that forks them.

It has no threads. DALI takes seconds to convert the functions of its graph; PyTorch's compiler is
imported by DeepSpeed for an optimizer that is not used.
"""

import gc

import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
import nvidia.dali.plugin.pytorch  # noqa: F401

import zeroi2v.train.main  # noqa: F401
from zeroi2v.config import ModelConfig
from zeroi2v.data.annotations import Sample
from zeroi2v.data.augment import AugmentConfig
from zeroi2v.data.clip_worker import ClipSource
from zeroi2v.data.graph import clip_graph
from zeroi2v.data.pipeline import ClipLoader

augment = AugmentConfig(rand_augment_ops=1)
plan = ClipLoader([Sample("a.mp4", 0)], ModelConfig(), batch_size=1, augment=augment).plan
clip_graph(ClipSource(plan, 0, 0), plan, False, False, batch_size=1, num_threads=1, device_id=None)
gc.freeze()  # DeepSpeed collects garbage many times at a start
