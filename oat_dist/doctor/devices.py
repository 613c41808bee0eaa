"""Whether every rank has a device for itself: a GPU that nobody else uses, or cores enough for its threads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from oat_dist.doctor.looks import Place, Trouble, by_node, ranks_text, trouble_rows
from oat_dist.doctor.rows import FAIL, PASS, WARN, Row
from oat_dist.engine.launcher import Plan, is_true
from oat_dist.errors import LaunchError

__all__ = ["Facts", "gpu_in_use", "judge", "look"]

_GIB = 1 << 30
_TAKEN = 1.5  # GiB of a GPU that drivers, displays and our own context hold
_SMALL_SHM = 1.0  # GiB; containers often give 64 MiB
_SHM = Path("/dev/shm")  # noqa: S108  # the one that NCCL uses
_QUOTAS = (Path("/sys/fs/cgroup/cpu.max"), Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"))


@dataclass(frozen=True)
class Facts:
    """Of one rank's device; from `identity` on of a GPU. `others_gib`: held by other processes."""

    kind: str
    name: str
    cores: tuple[int, ...]
    threads: int
    quota: float | None = None
    identity: str = ""
    total_gib: float = 0.0
    others_gib: float = 0.0
    bf16: bool = True
    shm_gib: float | None = None


def gpu_in_use(plan: Plan, local_rank: int) -> float:
    """GiB in use on this rank's GPU before the engine starts, which takes some itself; 0 on the CPU.

    Asked now also because one rank without a GPU would leave the others waiting for it.

    Raises:
        LaunchError: there is no GPU for this rank.
    """
    if is_true("ACCELERATE_USE_CPU"):
        if plan.stage:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # as start_engine does; torch looks only once
        return 0.0
    if not torch.cuda.is_available():
        return 0.0
    if local_rank >= torch.cuda.device_count():
        raise LaunchError(
            f"process {local_rank} of this machine has no GPU, there are {torch.cuda.device_count()}; start as many "
            "processes as GPUs, give each task its GPUs (--gpus-per-node, not --gpus-per-task), or set "
            "ACCELERATE_USE_CPU=true to train on the CPU"
        )
    free, total = torch.cuda.mem_get_info(local_rank)
    return (total - free) / _GIB


def _quota() -> float | None:
    """How many cores' time a container gives all its processes together; None: no limit."""
    for path in _QUOTAS:
        if path.is_file():
            first, *rest = path.read_text().split()
            if first in ("max", "-1"):
                continue
            period = rest[0] if rest else path.with_name("cpu.cfs_period_us").read_text()
            return int(first) / int(period)
    return None


def look(device: torch.device, in_use: float) -> Facts:
    """Uses the device, too: a GPU may be listed and yet refuse to work. `in_use`: what `gpu_in_use` has said."""
    cores, quota = tuple(sorted(os.sched_getaffinity(0))), _quota()
    threads = torch.get_num_threads()
    if device.type != "cuda":
        return Facts(device.type, "CPU", cores, threads, quota)
    assert float(torch.ones(64, device=device).sum()) == 64.0
    facts = torch.cuda.get_device_properties(device)
    shm = os.statvfs(_SHM) if _SHM.is_dir() else None
    return Facts(
        device.type,
        facts.name,
        cores,
        threads,
        quota,
        identity=_identity(facts),
        total_gib=facts.total_memory / _GIB,
        others_gib=in_use,
        bf16=torch.cuda.is_bf16_supported(including_emulation=False),
        shm_gib=None if shm is None else shm.f_blocks * shm.f_frsize / _GIB,
    )


def _identity(facts: object) -> str:
    """The UUID tells parts of one GPU (MIG) apart, where a PCI address does not."""
    uuid = getattr(facts, "uuid", None)
    pci = [getattr(facts, name, None) for name in ("pci_domain_id", "pci_bus_id", "pci_device_id")]
    return str(uuid) if uuid is not None else "pci " + ":".join(map(str, pci))


def judge(found: Sequence[Facts | Trouble], places: Sequence[Place], precision: str | None, workers: int) -> list[Row]:
    """`precision` as asked for, `workers` the decoding threads of each process."""
    rows = trouble_rows("devices", found, places)
    seen: list[tuple[Facts, Place]] = [
        (one, place) for one, place in zip(found, places, strict=True) if not isinstance(one, Trouble)
    ]
    if not seen:
        return rows
    kinds = {facts.kind for facts, _ in seen}
    if len(kinds) > 1:
        there = "; ".join(f"{kind}: {ranks_text([p for f, p in seen if f.kind == kind])}" for kind in sorted(kinds))
        rows.append(
            Row("devices", FAIL, f"not the same kind on all ranks: {there}", "give every rank a GPU, or none any")
        )
    if "cuda" in kinds:
        rows += _judge_gpus([(facts, place) for facts, place in seen if facts.kind == "cuda"], workers)
    rows += _judge_cores([(facts, place) for facts, place in seen if facts.kind == "cpu"])
    if precision == "bf16":
        rows += _judge_bf16(seen)
    if any(row.status in (WARN, FAIL) for row in rows if row.check == "devices"):
        return rows
    return [Row("devices", PASS, _described(seen)), *rows]


def _described(seen: Sequence[tuple[Facts, Place]]) -> str:
    facts = seen[0][0]
    if facts.kind == "cpu":
        cores = {place.node: len(facts.cores) for facts, place in seen}
        text = f"CPU, {facts.threads} thread(s) in each process"
        return f"{text}, {' and '.join(f'{count} cores on {node}' for node, count in list(cores.items())[:4])}"
    names = sorted({facts.name for facts, _ in seen})
    free = min(facts.total_gib - facts.others_gib for facts, _ in seen)
    return f"{len(seen)} GPU(s), {', '.join(names)}, each its own; {free:.1f} GiB free or more"


def _judge_gpus(seen: Sequence[tuple[Facts, Place]], workers: int) -> list[Row]:
    rows: list[Row] = []
    owners: dict[str, list[Place]] = {}
    for facts, place in seen:
        owners.setdefault(facts.identity, []).append(place)
    for identity, there in owners.items():
        if len(there) > 1:
            rows.append(
                Row(
                    "devices",
                    FAIL,
                    f"one GPU ({identity}) for {ranks_text(there)}",
                    "set LOCAL_RANK to 0, 1, ... on each node (SLURM_LOCALID), and let every task see all GPUs of it",
                )
            )
    for facts, place in seen:
        if facts.others_gib > _TAKEN and len(owners[facts.identity]) == 1:
            rows.append(
                Row(
                    "devices",
                    WARN,
                    f"{facts.others_gib:.1f} of {facts.total_gib:.1f} GiB are taken on {ranks_text([place])}'s GPU",
                    "nvidia-smi on that node shows whose process it is; end it, or ask for GPUs of your own",
                )
            )
    for node, there in by_node(place for _, place in seen).items():
        here = [facts for facts, place in seen if place.node == node]
        cores = _cores(here)
        if cores < len(there) * workers:
            rows.append(
                Row(
                    "devices",
                    WARN,
                    f"{len(there)} process(es) with {workers} decoding threads each on {cores:g} core(s) of {node}",
                    "ask for more cores (--cpus-per-task), or the GPUs will wait for data",
                )
            )
        small = [facts.shm_gib for facts in here if facts.shm_gib is not None and facts.shm_gib < _SMALL_SHM]
        if small and len(there) > 1:
            rows.append(
                Row(
                    str(_SHM),
                    WARN,
                    f"{min(small) * 1024:.0f} MiB on {node}; NCCL exchanges data between GPUs there",
                    "give the container more (docker run --shm-size=8g, or --ipc=host)",
                )
            )
    return rows


def _cores(here: Sequence[Facts]) -> float:
    together = len({core for facts in here for core in facts.cores})
    return min([together, *(facts.quota for facts in here if facts.quota is not None)])


def _judge_cores(seen: Sequence[tuple[Facts, Place]]) -> list[Row]:
    rows = []
    for node, there in by_node(place for _, place in seen).items():
        here = [facts for facts, place in seen if place.node == node]
        threads, cores = sum(facts.threads for facts in here), _cores(here)
        if threads > cores:
            each = max(int(cores) // len(there), 1)
            fewer = f"start at most {max(int(cores), 1)} processes there, or " if len(there) > cores else ""
            rows.append(
                Row(
                    "devices",
                    WARN,
                    f"{len(there)} process(es) with {threads} computing threads in all on {cores:g} core(s) of {node}: "
                    "they will wait for each other",
                    f"{fewer}set engine.threads={each}, or ask for more cores (--cpus-per-task)",
                )
            )
    return rows


def _judge_bf16(seen: Sequence[tuple[Facts, Place]]) -> list[Row]:
    without = [place for facts, place in seen if not facts.bf16]
    if without:
        names = ", ".join(sorted({facts.name for facts, _ in seen if not facts.bf16}))
        return [Row("bf16", FAIL, f"{names} on {ranks_text(without)} cannot compute in it", "set engine.precision=no")]
    if seen[0][0].kind == "cpu":
        return [Row("bf16", PASS, "on a CPU: any can compute in it, few are fast at it")]
    return [Row("bf16", PASS, "supported by every GPU")]
