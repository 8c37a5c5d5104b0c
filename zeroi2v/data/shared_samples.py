"""A list of samples in a file that all processes map: a million rows cost each of them nothing."""

from __future__ import annotations

import json
import os
import tempfile
from array import array
from collections.abc import Iterable, Sequence
from weakref import finalize

import numpy as np

from zeroi2v.data.annotations import Sample

_FIELDS = ("path", "label", "start", "end", "span", "filename_tmpl", "frames")


class SharedSamples(Sequence):
    """`samples`, each a line of a temporary file that is deleted with this object. Only the file's
    name is pickled, so a process that unpickles it must end before this object does.
    """

    def __init__(self, samples: Iterable[Sample]):
        ends = array("q", [0])
        with tempfile.NamedTemporaryFile(prefix="zeroi2v-samples-", delete=False) as file:
            finalize(self, os.unlink, file.name)
            for sample in samples:
                line = json.dumps([getattr(sample, name) for name in _FIELDS]).encode()
                ends.append(ends[-1] + file.write(line))
            ends.tofile(file)
        self.__setstate__((file.name, len(ends) - 1))

    def __getstate__(self) -> tuple[str, int]:
        return self._path, self._count

    def __setstate__(self, state: tuple[str, int]) -> None:
        self._path, self._count = state
        place = os.path.getsize(self._path) - 8 * (self._count + 1)
        self._ends = np.memmap(self._path, np.int64, "r", place, (self._count + 1,))
        self._bytes = np.memmap(self._path, np.uint8, "r")

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Sample:
        index = range(self._count)[index]
        line = self._bytes[self._ends[index] : self._ends[index + 1]].tobytes()
        values = dict(zip(_FIELDS, json.loads(line), strict=True))
        if values["span"] is not None:
            values["span"] = tuple(values["span"])
        return Sample(**values)
