"""An index over tars that somebody else wrote (webdataset's ShardWriter, img2dataset), which stay as they are."""

from oat_dist.data.foreign.rules import Rules
from oat_dist.data.foreign.shard_list import find_shards
from oat_dist.data.foreign.write_index import Indexed, index_shards

__all__ = ["Indexed", "Rules", "find_shards", "index_shards"]
