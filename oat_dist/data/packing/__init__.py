"""From labelled images to shards."""

from oat_dist.data.packing.split_index import image_size_range
from oat_dist.data.packing.write import SplitPreview, preview_splits, write_shards, write_splits

__all__ = ["SplitPreview", "image_size_range", "preview_splits", "write_shards", "write_splits"]
