"""`deepspeed train/main.py --config …`: `zeroi2v train` for launchers that want a file.

zeroi2v must be installed, from a checkout by `pip install -e '.[train]'`.
"""

import sys

from zeroi2v.cli import run
from zeroi2v.train.main import main

if __name__ == "__main__":
    sys.exit(run(main))
