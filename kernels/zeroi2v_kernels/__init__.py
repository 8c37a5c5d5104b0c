"""GPU ops of zeroi2v, usable without it: head-shifted attention on packed qkv."""

from zeroi2v_kernels.choice import choose_backend
from zeroi2v_kernels.stdha import stdha, stdha_reference, stdha_split

__all__ = ["choose_backend", "stdha", "stdha_reference", "stdha_split"]
