"""`python -m zeroi2v.train`: the same as `zeroi2v train`."""

import sys

from zeroi2v.cli import run
from zeroi2v.train.main import main

if __name__ == "__main__":
    sys.exit(run(main))
