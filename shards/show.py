"""Numbers and pictures of a packed set: `python shards/show.py --help`. The same as `oat-dist inspect`."""

from oat_dist.commands.inspect import main

if __name__ == "__main__":
    raise SystemExit(main())
