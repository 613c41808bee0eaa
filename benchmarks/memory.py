"""What a rank holds of a network under every engine, in bytes, beside theory.

    make bench-memory          (or: python benchmarks/memory.py [--model vit_b_16] [--optimizer adamw] ...)

Starts real CPU processes for each engine, takes steps of two micro-batches of one sample a rank, and looks at what is
held between the micro-batches, after the last backward pass, and at rest, after the step. Held means: the storages of
tensors, each counted once, whoever owns it: also buffers that DeepSpeed keeps, and those of DDP in C++. The last row,
every tensor that Python knows of, shows that nothing was forgotten.

Theory, in bytes a parameter: W ranks, fp32 weights, k state tensors of the optimizer (1: momentum, 2: AdamW).

             weights   gradients: between, after backward, at rest   state    masters
    ddp      4         4, 4, 0; and 4 in the buckets of the exchange  4k       none
    zero1    4         4, 4 / W, 0                                    4k / W   none: they are the weights
    zero2    4         4 / W, 4 / W, 0                                4k / W   none
    zero3    4 / W     4 / W, 4 / W, 0                                4k / W   none

DeepSpeed's buffer for the exchange comes on top, of reduce_bucket_size elements: ZeRO-1 has it between micro-batches,
ZeRO-3 between the first micro-batch and the step.

Exits with 1 when ZeRO-3 at rest holds more than 0.52 of DDP's parameters and optimizer state on two processes.
"""

# No `from __future__ import annotations`: DDP reads the annotations of its communication hook.
import argparse
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from oat_dist import OATLoss
from oat_dist.engine import Engine, Replica, start_engine
from oat_dist.engine.ddp import DataParallel
from oat_dist.engine.launcher import ENGINES, PRECISIONS
from oat_dist.engine.zero import Zero
from oat_dist.engine.zero_config import BatchShape
from oat_dist.engine.zero_state import held
from oat_dist.models import build_model
from oat_dist.objectives import OAT
from oat_dist.optim import OPTIMIZERS, build_optimizer

CLASSES = 1000
MOST_OF_DDP = 0.52
MOMENTS = ("between micro-batches", "after backward", "at rest")
KINDS = ("parameters", "gradients", "optimizer state", "exchange buffers")
# The default of 5e8 elements is a buffer of 2 GB, which would dwarf the network.
BUCKET = 10_000_000
# Without the zeros ZeRO-3 keeps small parameters whole on every rank, and others gathered until they are used again.
ZERO3 = {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}

Storages = dict[int, int]  # address: bytes


def storages(tensors: Iterable[Tensor | None]) -> Storages:
    """Every storage once, however many views there are of it."""
    found = {}
    for tensor in tensors:
        if tensor is not None and tensor.device.type != "meta":
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    found.pop(0, None)  # empty ones
    return found


def within(value: object) -> Iterator[Tensor]:
    """The tensors in lists and dicts of lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from within(item)


class Buckets:
    """DDP's gradient buckets: they live in C++, but a communication hook is shown them. This one averages as DDP does.

    Attributes:
        seen: their storages, after a backward pass with an exchange.
    """

    def __init__(self, model: nn.Module) -> None:
        self.seen: Storages = {}
        if isinstance(model, DistributedDataParallel):
            model.register_comm_hook(None, self._hook)

    def _hook(self, state: None, bucket: torch.distributed.GradBucket) -> torch.futures.Future[Tensor]:
        buffer = bucket.buffer()
        self.seen |= storages([buffer])
        buffer.div_(torch.distributed.get_world_size())
        work = torch.distributed.all_reduce(buffer, async_op=True)
        return work.get_future().then(lambda future: cast(Tensor, future.value()[0]))


def holdings(replica: Replica, buckets: Buckets) -> dict[str, int]:
    """Bytes by kind. What is of two kinds counts as the first: masters that are the weights are no state."""
    parameters = list(replica.network.parameters())
    weights = storages([*parameters, *(held(parameter) for parameter in parameters)])
    gradients = storages(parameter.grad for parameter in parameters)
    if isinstance(replica, Zero):
        zero, optimizer = replica.optimizer, replica.optimizer.optimizer
        masters = zero.fp32_partitioned_groups_flat if replica.stage == 3 else zero.single_partition_of_fp32_groups
        for name in ("averaged_gradients", "all_grad_tensors", "grads_in_partition", "grad_partitions_flat_buffer"):
            gradients |= storages(within(getattr(zero, name, None)))
        gradients |= storages(master.grad for master in masters)
        exchange = storages(within([bucket.buffer for bucket in zero.ipg_buckets.values()]))
    else:
        optimizer, masters, exchange = cast(DataParallel, replica).optimizer, [], buckets.seen
    state = storages(within([masters, list(optimizer.state.values())]))
    found: dict[str, int] = {}
    counted: Storages = {}
    for kind, storage in zip(KINDS, (weights, gradients, state, exchange), strict=True):
        found[kind] = sum(size for address, size in storage.items() if address not in counted)
        counted |= storage
    found["held"] = sum(found.values())
    gc.collect()
    live = storages(thing for thing in gc.get_objects() if issubclass(type(thing), Tensor))
    found["every live tensor"] = sum((counted | live).values())
    found["resident"] = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return found


def theory(engine: str, parameters: int, world: int, optimizer: str, bucket: int) -> dict[str, dict[str, float]]:
    """Bytes by moment and kind, without the padding to equal parts."""
    whole, part, stage = 4.0 * parameters, 4.0 * parameters / world, ENGINES.index(engine)
    between = whole if stage < 2 else part
    after = part if stage else whole
    fixed = {
        "parameters": part if stage == 3 else whole,
        "optimizer state": (part if stage else whole) * (2 if optimizer == "adamw" else 1),
    }
    found = {}
    for moment, gradients in zip(MOMENTS, (between, after, 0.0), strict=True):
        kept = moment != MOMENTS[2] if stage == 3 else stage == 1 and moment == MOMENTS[0]
        exchange = whole if stage == 0 else 4.0 * bucket if kept else 0.0
        found[moment] = {**fixed, "gradients": gradients, "exchange buffers": exchange}
        found[moment]["held"] = sum(found[moment].values())
    return found


def measure(engine: Engine, model: str, image_size: int, optimizer: str) -> dict[str, Any]:
    """Two steps of two micro-batches; what this rank holds in the second one."""
    torch.manual_seed(0)
    network = build_model(model, CLASSES, image_size=image_size)
    elements = sum(parameter.numel() for parameter in network.parameters())
    replica = engine.prepare(network, build_optimizer(network, optimizer, 1.0), BatchShape(1, 2))
    buckets = Buckets(replica.model)
    images_BCHW = torch.randn(1, 3, image_size, image_size)
    labels_B = torch.tensor([engine.world.rank])
    objective = OAT(OATLoss(CLASSES, scope="global"))
    replica.warm_up(images_BCHW)
    found: dict[str, Any] = {}
    buckets.seen = {}  # DDP has made new ones since
    for _ in range(2):
        for number in range(2):
            with replica.micro_step(last=number == 1):
                loss = objective.loss(replica.model(images_BCHW), labels_B, 2 * engine.world.size, None)
                replica.backward(loss)
            found[MOMENTS[number]] = holdings(replica, buckets)
        replica.step(1e-5)
        found["at rest"] = holdings(replica, buckets)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    replica.close()
    return {"moments": found, "elements": elements, "peak resident": peak}


def rank(
    name: str, model: str, image_size: int, optimizer: str, precision: str, bucket: int = BUCKET
) -> dict[str, Any]:
    """`measure` in this process, which a launcher has started; of the rank that holds most, with theory beside it."""
    settings: dict[str, Any] = {"stage": ENGINES.index(name), "reduce_bucket_size": bucket}
    if name == "zero3":
        settings |= ZERO3
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump({"zero_optimization": settings}, file)
        file.flush()
        engine = start_engine(name=name, deepspeed=None if name == "ddp" else file.name, precision=precision, threads=1)
    every = engine.world.gather_objects(measure(engine, model, image_size, optimizer))
    found = max(every, key=lambda each: int(each["moments"]["after backward"]["held"]))
    found["peak resident"] = max(each["peak resident"] for each in every)
    found["theory"] = theory(name, found["elements"], engine.world.size, optimizer, bucket)
    engine.close()
    return found


def start(processes: int, *arguments: str) -> dict[str, Any]:
    """`rank` on so many new processes."""
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        # What is freed goes back to the system, so that resident memory says what is held.
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }
    with tempfile.NamedTemporaryFile("r", suffix=".json") as file:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        subprocess.run(
            [sys.executable, *launch, __file__, "--rank", file.name, *arguments], env=environment, check=True
        )
        return cast(dict[str, Any], json.load(file))


def show(results: Mapping[str, dict[str, Any]]) -> None:
    """The table: MiB held and, in brackets, what theory says."""
    print(f"{'MiB a rank (theory)':<24}" + "".join(f"{name:>22}" for name in results))
    for moment in MOMENTS:
        print(moment)
        for kind in (*KINDS, "held", "every live tensor", "resident"):
            line = f"  {kind:<22}"
            for result in results.values():
                expected = result["theory"][moment].get(kind)
                cell = f"{result['moments'][moment][kind] / 2**20:,.1f}"
                line += f"{cell if expected is None else f'{cell} ({expected / 2**20:,.1f})':>22}"
            print(line)
    peaks = "".join(f"{result['peak resident'] / 2**20:>22,.1f}" for result in results.values())
    print(f"{'peak resident':<24}{peaks}")
    print(
        "Resident memory holds Python, libraries and activations too. It falls with what is held only because freed "
        "memory\nis given back at once here (MALLOC_MMAP_THRESHOLD_); elsewhere it does not show the sharding."
    )


def judge(results: Mapping[str, dict[str, Any]], processes: int) -> int:
    """Print the ratios at rest; 1 when ZeRO-3 holds too much."""
    at_rest = {name: int(result["moments"]["at rest"]["held"]) for name, result in results.items()}
    least = 0.0
    if "ddp" in at_rest:
        ddp = results["ddp"]["moments"]["at rest"]
        least = ddp["parameters"] + ddp["optimizer state"]
        for name, held in at_rest.items():
            print(
                f"{name} at rest holds {held / ddp['held']:.3f} of what ddp holds, "
                f"{held / least:.3f} of its parameters and optimizer state"
            )
    if processes != 2 or not {"ddp", "zero3"} <= at_rest.keys() or at_rest["zero3"] <= MOST_OF_DDP * least:
        return 0
    print(f"error: zero3 holds more than {MOST_OF_DDP} of ddp's parameters and optimizer state")
    return 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_l_16", help="a name of model.name (default vit_l_16)")
    parser.add_argument("--image-size", type=int, default=224, help="pixels a side (default 224)")
    parser.add_argument("--engines", default=",".join(ENGINES), help=f"by commas (default {','.join(ENGINES)})")
    parser.add_argument("--processes", type=int, default=2, help="ranks of each engine (default 2)")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="sgd")
    parser.add_argument("--precision", choices=PRECISIONS, default="no")
    parser.add_argument("--rank", help=argparse.SUPPRESS)  # this is a rank; the file for its result
    asked = parser.parse_args()
    engines = asked.engines.split(",")
    if not set(engines) <= set(ENGINES):
        parser.error(f"--engines takes {', '.join(ENGINES)}")
    if asked.rank:
        found = rank(engines[0], asked.model, asked.image_size, asked.optimizer, asked.precision)
        if os.environ["RANK"] == "0":
            Path(asked.rank).write_text(json.dumps(found))
        return 0
    shared = [f"--model={asked.model}", f"--image-size={asked.image_size}", f"--optimizer={asked.optimizer}"]
    results = {}
    for name in engines:
        results[name] = start(asked.processes, *shared, f"--precision={asked.precision}", f"--engines={name}")
    elements = results[engines[0]]["elements"]
    print(f"{asked.model}, {elements:,} parameters, {asked.processes} processes, {asked.optimizer}, {asked.precision}")
    show(results)
    return judge(results, asked.processes)


if __name__ == "__main__":
    sys.exit(main())
