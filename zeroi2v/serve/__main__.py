"""`python -m zeroi2v.serve`: the same as `zeroi2v serve`."""

import sys

from zeroi2v.cli import run
from zeroi2v.serve.main import main

if __name__ == "__main__":
    sys.exit(run(main))
