"""Train a classifier: ``accelerate launch launch/train.py CONFIG``, or plain ``python`` for one process."""

import sys

from oat_dist.train import main

if __name__ == "__main__":
    sys.exit(main())
