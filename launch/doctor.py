"""The ``doctor`` command as a script: see ``--help``."""

import sys

from oat_dist.commands.doctor import main

if __name__ == "__main__":
    sys.exit(main())
