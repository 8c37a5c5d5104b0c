"""A source of clips in which some files kill or hold up the process that decodes them."""

import os
import signal
import time

from zeroi2v.data import clip_worker


class DeadlySource(clip_worker.ClipSource):
    """As `ClipSource`, but files named `deadly…` crash their worker and `endless…` hang it."""

    def read(self, *args):
        if self._is_worker:
            clip_worker.read_sample = read_sample
        return super().read(*args)


really_read_sample = clip_worker.read_sample


def read_sample(sample, *args):
    name = os.path.basename(sample.path)
    if name.startswith("deadly"):
        os.kill(os.getpid(), signal.SIGSEGV)
    if name.startswith("endless"):
        time.sleep(600)
    return really_read_sample(sample, *args)
