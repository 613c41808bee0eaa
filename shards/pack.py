"""Pack images into shards: `python shards/pack.py --help`. The same as `oat-dist pack`."""

from oat_dist.commands.pack import main

if __name__ == "__main__":
    raise SystemExit(main())
