"""``python -m upright`` is ``upright``."""

import sys

from upright.cli import main

sys.exit(main())
