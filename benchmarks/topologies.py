"""Chips that need not be there: what to compile a program for, and what it would need on them.

    chip = CHIPS["v5e"]
    compiled = compile_for(chip, function, *arguments)

Needs a compiler for them: the extra "aot". Nothing can be run, and a program that needs more memory
than a GPU has is compiled without complaint: compare with `Chip.memory`.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import Any, Literal

import jax
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

GB = 10**9


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip as its maker describes it."""

    name: str
    platform: Literal["tpu", "cuda"]
    topology: str
    """One chip of it, as JAX's compiler calls that."""
    memory: int
    """Bytes."""
    bandwidth: float
    """Bytes a second between the chip and that memory."""
    device_kind: str
    """As `jax.Device.device_kind` has it on a machine with one."""


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "tpu", "v5e:1x1", 16 * 2**30, 819e9, "TPU v5 lite"),
        Chip("v5p", "tpu", "v5p:1x1x1", 95 * 2**30, 2765e9, "TPU v5"),
        Chip("v6e", "tpu", "v6e:1x1", 32 * 2**30, 1640e9, "TPU v6 lite"),
        Chip("h100", "cuda", "1x1x1", 80 * GB, 3350e9, "NVIDIA H100 80GB HBM3"),
        Chip("h200", "cuda", "1x1x1", 141 * GB, 4800e9, "NVIDIA H200"),
    )
}

# The compiler's description of a Hopper GPU (SXM): NVIDIA's H100 white paper, and the compute
# capability 9.0 column of the CUDA programming guide. The two chips differ in their memory.
HOPPER = """
gpu_device_info {{
  cuda_compute_capability {{ major: 9 minor: 0 }}
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  l2_cache_size: 52428800
  memory_bandwidth: {bandwidth:.0f}
  device_memory_size: {memory}
  driver_version: "12.8.0"
  runtime_version: "12.8.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
device_description_str: "{device_kind}"
"""


def sharding(chip: Chip) -> NamedSharding:
    """All of an array on one such chip; raises what JAX raises where its compiler is missing.

    From then on JAX starts no device of this machine but the CPU.
    """
    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # ask no server which TPU this machine has
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing holds a chip: no lock
    if chip.platform == "tpu":
        described = topologies.get_topology_desc(platform="tpu", topology_name=chip.topology)
    else:
        fields = {name: getattr(chip, name) for name in ("bandwidth", "memory", "device_kind")}
        described = topologies.get_topology_desc(
            platform="cuda", topology=chip.topology, target_config=HOPPER.format(**fields)
        )
    return NamedSharding(topologies.make_mesh(described, (1,), ("chip",)), PartitionSpec())


def compile_for(
    chip: Chip, function: Callable[..., Any], *arguments: Any, donate: tuple[int, ...] = ()
) -> jax.stages.Compiled:
    """The executable of `function` for one chip; `arguments` are arrays or their shapes."""
    place = sharding(chip)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arguments)
    jitted = jax.jit(function, in_shardings=place, out_shardings=place, donate_argnums=donate)
    return jitted.trace(*shapes).lower(lowering_platforms=(chip.platform,)).compile()
