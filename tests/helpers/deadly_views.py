"""As `deadly`, for views; apart from it, for it imports torch in every worker."""

from deadly import read_sample

from zeroi2v.data import clip_worker, views


class DeadlyViews(views.ViewSource):
    """As `ViewSource`, but files named `deadly…` crash their worker and `endless…` hang it."""

    def read(self, *args):
        if self._is_worker:
            clip_worker.read_sample = read_sample
        return super().read(*args)
