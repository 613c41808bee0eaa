"""The one place that makes the Accelerator: devices, processes, DDP and DeepSpeed ZeRO, precision."""

from oat_dist.engine.base import Engine
from oat_dist.engine.replica import Replica
from oat_dist.engine.start import start_engine

__all__ = ["Engine", "Replica", "start_engine"]
