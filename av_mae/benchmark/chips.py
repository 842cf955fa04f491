"""Public figures of accelerator chips, for rooflines and for shares of the peak.

TPUs, Google Cloud's documentation as read in November 2026: docs.cloud.google.com/tpu/docs/v5e (197 TFLOP/s bfloat16,
16 GB and 819 GB/s of HBM, 400 GB/s of interconnect counting both directions, 2D torus up to 256 chips, 6.4 Tb/s of
data-centre network for these), /v5p-training (459 TFLOP/s, 95 GiB, 2,765 GB/s, 1,200 GB/s, 3D torus up to 8,960
chips, 50 Gb/s a chip) and /v6e (918 TFLOP/s, 32 GB, 1,600 GB/s, 800 GB/s, 2D torus up to 256 chips, 25.6 Tb/s for
these). GPUs: NVIDIA's data sheets of H100 SXM5, H200 SXM and A100 SXM4 (dense bfloat16).
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU. Rates per second: `flops` dense in bfloat16, bytes of `memory_rate`, `link_rate` (sent over all links of
    the interconnect together) and `network_rate` (a chip's share of the data-centre network). `memory` in bytes; a
    slice has up to `most` chips in `dimensions` dimensions, whose rings close where an axis has a multiple of `ring`
    chips. Matrix units take squares of `tile` × `tile` values at `clock` Hz (the peak over the units' multiply-adds).
    """

    kind: str
    flops: float
    memory: int
    memory_rate: float
    link_rate: float
    network_rate: float
    dimensions: int
    most: int
    ring: int
    tile: int
    clock: float


CHIPS = {
    "v5e": Chip("TPU v5 lite", 197e12, 16 * 2**30, 819e9, 200e9, 3.1e9, 2, 256, 16, 128, 1.5e9),
    "v5p": Chip("TPU v5", 459e12, 95 * 2**30, 2765e9, 600e9, 6.2e9, 3, 8960, 4, 128, 1.75e9),
    "v6e": Chip("TPU v6 lite", 918e12, 32 * 2**30, 1600e9, 400e9, 12.5e9, 2, 256, 16, 256, 1.75e9),
}
# Dense bfloat16 peak FLOP/s by `device_kind`.
PEAK_FLOPS = {chip.kind: chip.flops for chip in CHIPS.values()} | {
    "TPU v4": 275e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
}
