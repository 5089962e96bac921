"""`python -m repa_fast COMMAND`, and `torchrun -m repa_fast COMMAND` on several processes."""

import sys

from repa_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
