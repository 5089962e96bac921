"""Train a SiT with representation alignment: `torchrun train.py --preset NAME --data-dir DIR`.

`python train.py --help` lists the flags; `python train.py --preset digits` runs on a laptop.
"""

import sys

from repa_fast.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
