"""The GPU that the fakes believe in, and the failures that a test switches on."""

from dataclasses import dataclass, field


@dataclass
class Faults:
    """Failures that a test switches on; all are off at first.

    `out_of_memory_on_device` makes every allocation of the fake GPU fail, `fail_capture` every capture of a CUDA
    graph; the others belong to the TensorRT call of their name.
    """

    out_of_memory_in_build: bool = False
    fail_build: bool = False
    out_of_memory_in_load: bool = False
    out_of_memory_in_context: bool = False
    fail_enqueue: bool = False
    out_of_memory_on_device: bool = False
    fail_capture: bool = False


@dataclass
class Machine:
    """One GPU, as a fake `tensorrt` and the fake CUDA device that goes with it see it.

    `plugins_ready` becomes true with `init_libnvinfer_plugins`.
    """

    gpu: str
    compute_capability: tuple[int, int]
    faults: Faults = field(default_factory=Faults)
    plugins_ready: bool = False
