"""Check packed shards: `python shards/verify.py --help`. The same as `oat-dist verify`."""

from oat_dist.commands.verify import main

if __name__ == "__main__":
    raise SystemExit(main())
