"""``python -m upright`` is ``upright``."""

import sys

from upright.cli import main

if __name__ == "__main__":  # a worker of `upright serve` imports this file
    sys.exit(main())
