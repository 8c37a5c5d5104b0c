"""`python -m zeroi2v`: the `zeroi2v` command."""

import sys

from zeroi2v.cli import main

if __name__ == "__main__":
    sys.exit(main())
