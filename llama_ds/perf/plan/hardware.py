"""Descriptions of GPUs and their links, one YAML file in data/ for each kind of machine.

Vendors' figures (peak, memory bandwidth, links) are kept apart from measured or fitted constants (`Calibration`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llama_ds.config.reader import ConfigSource, read
from llama_ds.config.recompute import GIB
from llama_ds.config.text import dump_yaml, read_yaml
from llama_ds.errors import UserError, did_you_mean
from llama_ds.layout.flops import device_peak
from llama_ds.perf.plan.curves import OPERATIONS, Curves

# Limits refuse what no machine has, such as figures in other units: a memory in MiB, a bandwidth in bytes/s.
LEAST, MOST = 1e-9, 1e9
LIMITS = {"memory_gib": 1e4, "bandwidth_gb_s": 1e6, "peak_tflops": 1e6, "processors": 1e6, "power_w": 1e5}
LIMITS |= {"links.nvlink_gb_s": 1e6, "links.network_gb_s": 1e6, "links.ring_gb_s": 1e6, "links.gpus_per_node": 1e5}
MAX_SPREAD = 0.2  # ranks that differ more are not of one kind
EXAMPLE = "llama_ds/perf/plan/data/a100-80gb.yaml"
FOLDER = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Links:
    """Links between the GPUs of a node and between nodes."""

    gpus_per_node: int
    nvlink_gb_s: float  # bus bandwidth of a large all-reduce within a node, GB/s (nccl-tests' busbw)
    nvlink_latency_us: float  # latency of a collective of two ranks within a node
    nvlink_hop_us: float  # additional latency per hop of its ring
    network_gb_s: float | None = None  # all network links of a node, one direction, GB/s; None: unknown
    network_latency_us: float = 10.0  # latency of a message or a ring hop between nodes
    ring_gb_s: float | None = None  # the most that one ring reaches between nodes, GB/s; None: all of their links


@dataclass(frozen=True)
class Calibration:
    """The physical constants of the time model; `tools/plan.py fit` writes them."""

    gemm_ceiling: float  # share of the peak that very large matrix products reach with the largest tile
    gemm_ramp: float  # overhead of a tile's start and end, in columns of K
    misaligned: float  # relative speed of a product whose rows are aligned to 16 bytes but not to 128
    memory: float  # share of the memory bandwidth that pointwise kernels reach
    flash_forward: float  # share of the peak that fused attention reaches on long sequences, head size 128
    flash_backward: float
    network: float  # share of the network's bandwidth that collectives reach
    contention: float  # slowdown of computation per second of overlapping communication
    launch_us: float  # host time per kernel launch
    kernel_us: float  # GPU time to start and drain a kernel
    step_ms: float  # host time at the end of a step: reading the norm, optimizer, data
    sources: str = ""  # origin of these constants


@dataclass(frozen=True)
class Hardware:
    """One kind of machine."""

    name: str
    device: str  # device name in `layout/flops.py`, which has its peak
    memory_gib: float
    processors: int  # streaming multiprocessors
    bandwidth_gb_s: float  # memory bandwidth, GB/s
    power_w: float  # power of one GPU, for the energy of a run
    links: Links
    calibration: Calibration
    dtype: str = "bf16"  # dtype of the runs that it describes, bf16 or fp32
    peak_tflops: float | None = None  # dense peak, for a device that `layout/flops.py` does not have
    at_once: int | None = None  # ranks per node that run at full speed in parallel, if they share processors
    host_computes: bool = False  # True on a CPU: host time and device time add up
    # Relative standard deviation of the step times of ranks with the same work (`rank_spread.py`). The default is that
    # of published runs which were repeated on more GPUs (`validate.measured_spread`).
    rank_spread: float = 0.023
    curves: Curves | None = None  # measured curves take precedence over calculated times

    @property
    def peak(self) -> float:
        """Dense peak in `dtype`, FLOP/s."""
        peak = self.peak_tflops * 1e12 if self.peak_tflops else device_peak(self.device, self.dtype)
        assert peak is not None
        return peak

    @property
    def fp8_speedup(self) -> float | None:
        """Peak of products in float8 over `peak`; None: the device has none, or `layout/flops.py` does not know."""
        peak = device_peak(self.device, "fp8")
        return None if peak is None else peak / self.peak

    @property
    def element_bytes(self) -> int:
        """Bytes of an element in `dtype`."""
        return 4 if self.dtype == "fp32" else 2

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gib * GIB)

    @property
    def network(self) -> float:
        """Bandwidth that collectives reach on a node's network links, in bytes/s.

        Raises:
            UserError: The bandwidth is unknown.
        """
        if self.links.network_gb_s is None:
            raise UserError(
                f"{self.name}: links.network_gb_s is not stated, and this is over more than one node of "
                f"{self.links.gpus_per_node}; run tools/machine.py comm on two hosts or more, or state it"
            )
        return self.links.network_gb_s * 1e9 * self.calibration.network

    def with_links(
        self,
        nvlink_gb_s: float | None,
        network_gb_s: float | None,
        ring_gb_s: float | None = None,
        gpus_per_node: int | None = None,
    ) -> Hardware:
        """Return the machine with the given link bandwidths and size of a node; None keeps its own."""
        links = replace(
            self.links,
            nvlink_gb_s=nvlink_gb_s or self.links.nvlink_gb_s,
            network_gb_s=network_gb_s or self.links.network_gb_s,
            ring_gb_s=ring_gb_s or self.links.ring_gb_s,
            gpus_per_node=gpus_per_node or self.links.gpus_per_node,
        )
        return replace(self, links=links)


def names() -> list[str]:
    """Return the names of the described machines."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def load(name: str) -> Hardware:
    """Return the machine with this name, or the one described in the YAML file at this path.

    Raises:
        UserError: There is no such machine, or its description is invalid.
    """
    path = path_of(name)
    data = read_yaml(str(path), "the description of a machine", EXAMPLE)
    hardware = read(Hardware, data, ConfigSource(str(path)))
    _check(hardware, str(path))
    return hardware


def path_of(name: str) -> Path:
    """Return the path of the description of the machine with this name, or `name` if it is a path.

    Raises:
        UserError: There is no such machine.
    """
    known = names()
    path = FOLDER / f"{name.lower()}.yaml"
    if not path.is_file():
        if not name.endswith((".yaml", ".yml")):
            raise UserError(
                f"--gpu {name}: not a described machine{did_you_mean(name.lower(), known)}; use "
                f"{', '.join(known)}, or the path of a YAML file like {EXAMPLE}"
            )
        path = Path(name)
    return path


def text(hardware: Hardware) -> str:
    """Return the description as YAML."""
    return dump_yaml({k: v for k, v in _plain(asdict(hardware)).items() if v is not None and v is not False})


def _plain(value: Any) -> Any:
    """Return the value with tuples replaced by lists, for YAML."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _check(hardware: Hardware, path: str) -> None:
    source = ConfigSource(path)
    if not hardware.name.strip():
        raise source.error("name", "is empty; give the machine one")
    if hardware.dtype not in ("bf16", "fp32"):
        raise source.error("dtype", f"= {hardware.dtype!r} is not bf16 or fp32")
    if hardware.peak_tflops is None and device_peak(hardware.device, hardware.dtype) is None:
        known = f"= {hardware.device!r} is not a device whose {hardware.dtype} peak layout/flops.py has, such as A100"
        raise source.error("device", f"{known}; give its peak_tflops")
    _check_curves(hardware.curves or Curves(), source)
    for key, section in (("", hardware), ("links.", hardware.links), ("calibration.", hardware.calibration)):
        for name, value in vars(section).items():
            number = isinstance(value, int | float) and not isinstance(value, bool) and name != "rank_spread"
            most = LIMITS.get(key + name, MOST)
            if number and not value > 0:
                raise source.error(key + name, f"= {value} is not positive")
            if number and not LEAST <= value <= most:
                raise source.error(
                    key + name, f"= {value:g} is not from {LEAST:g} to {most:g}; give it in the unit of its name"
                )
    if not 0 <= hardware.rank_spread <= MAX_SPREAD:
        allowed = f"is not from 0 to {MAX_SPREAD}; it is a share of a step's time"
        raise source.error("rank_spread", f"= {hardware.rank_spread} {allowed}")
    for name in ("gemm_ceiling", "misaligned", "memory", "flash_forward", "flash_backward", "network", "contention"):
        if getattr(hardware.calibration, name) > 1:
            raise source.error(
                f"calibration.{name}", f"= {getattr(hardware.calibration, name)} is above 1; it is a share"
            )


def _check_curves(curves: Curves, source: ConfigSource) -> None:
    """Refuse curves that cannot be interpolated: sizes that do not grow, tables of the wrong shape, zeros."""
    axes: list[tuple[str, Sequence[float], Any]] = []  # name, sizes, values at the sizes
    if curves.products:
        sizes: Sequence[float] = curves.products.sizes
        axes += [("products.tflops", sizes, curves.products.tflops)]
        for i, plane in enumerate(curves.products.tflops):
            axes += [(f"products.tflops.{i}", sizes, plane)]
            axes += [(f"products.tflops.{i}.{j}", sizes, row) for j, row in enumerate(plane)]
    if curves.attention:
        for name in ("forward_tflops", "backward_tflops"):
            table = getattr(curves.attention, name)
            axes += [(f"attention.{name}", curves.attention.head_dim, table)]
            axes += [(f"attention.{name}.{i}", curves.attention.seq_len, row) for i, row in enumerate(table)]
    if curves.kernels:
        axes += [(f"kernels.{name}", rate.bytes, rate.gb_s) for name, rate in vars(curves.kernels).items()]
    for i, found in enumerate(curves.collectives):
        axes += [(f"collectives.{i}", found.bytes, found.us)]
        if found.operation not in OPERATIONS:
            raise source.error(
                f"curves.collectives.{i}.operation", f"= {found.operation!r} is not one of {', '.join(OPERATIONS)}"
            )
    for name, sizes, values in axes:
        if not sizes or any(b <= a for a, b in zip((0, *sizes), sizes, strict=False)):
            raise source.error(f"curves.{name}", f"has sizes {list(sizes)}; they must be positive and grow")
        if len(values) != len(sizes):
            raise source.error(f"curves.{name}", f"has {len(values)} entries for {len(sizes)} sizes")
        if any(isinstance(value, float | int) and not value > 0 for value in values):
            raise source.error(f"curves.{name}", "holds a value that is not positive")
