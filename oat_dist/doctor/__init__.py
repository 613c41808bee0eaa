"""What `oat-dist doctor` does: look at an allocation as the training will find it, before it is trusted."""

from oat_dist.doctor.rows import Row, as_json, print_rows
from oat_dist.doctor.run import Options, examine

__all__ = ["Options", "Row", "as_json", "examine", "print_rows"]
