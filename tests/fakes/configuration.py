"""What a build is told: builder configuration, optimisation profiles, timing caches."""

from collections.abc import Mapping
from typing import Any, ClassVar

from tests.fakes.classes import Api, Borrowed, Model
from tests.fakes.interfaces import Callback, Dims, HostMemory, Reporting
from tests.fakes.plan import CACHE_MAGIC, Layer, Shape, Tensor, UnreadableError, decode, encode


class OptimizationProfile(Model):
    public = "IOptimizationProfile"
    builder = Borrowed("the Builder of an optimisation profile")

    def __init__(self, api: Api, builder: Model) -> None:
        super().__init__(api, builder)
        self.builder = api.expose(builder)
        self.shapes: dict[str, tuple[Shape, Shape, Shape]] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        """Raises RuntimeError in pybind11's words if the three contradict each other."""
        shapes = {"min": tuple(min), "opt": tuple(opt), "max": tuple(max)}
        lower: Shape = (0,) * len(shapes["min"])
        for name, shape in shapes.items():
            if len(shape) != len(lower) or any(size < least for size, least in zip(shape, lower, strict=True)):
                raise RuntimeError(f"Shape provided for {name} is inconsistent with other shapes.")
            lower = shape
        self.shapes[input] = (shapes["min"], shapes["opt"], shapes["max"])

    def get_shape(self, input: str) -> list[Dims]:
        return [Dims(self.api, shape) for shape in self.shapes.get(input, ())]


class BuilderConfig(Reporting):
    public = "IBuilderConfig"
    settable: ClassVar[Mapping[str, str]] = {
        "progress_monitor": "IProgressMonitor | None",
        "profiling_verbosity": "ProfilingVerbosity",
        "hardware_compatibility_level": "HardwareCompatibilityLevel",
        "builder_optimization_level": "SupportsInt",
        "avg_timing_iterations": "SupportsInt",
        "max_aux_streams": "SupportsInt",
    }
    builder = Borrowed("the Builder of a configuration")
    progress_monitor = Callback("the progress monitor")

    def __init__(self, api: Api, builder: Model) -> None:
        super().__init__(api, builder)
        self.builder = api.expose(builder)
        self.profiling_verbosity = api.enums["ProfilingVerbosity"].LAYER_NAMES_ONLY
        self.hardware_compatibility_level = api.enums["HardwareCompatibilityLevel"].NONE
        self.avg_timing_iterations = 1
        self.max_aux_streams = -1
        self.profiles: list[OptimizationProfile] = []
        self._level = 3
        self._flags = {api.enums["BuilderFlag"].TF32}
        self._pools: dict[Any, int] = {}
        self._cache: TimingCache | None = None

    @property
    def builder_optimization_level(self) -> int:
        return self._level

    @builder_optimization_level.setter
    def builder_optimization_level(self, level: int) -> None:
        if 0 <= level <= 5:
            self._level = level
        else:
            text = f"Parameter check failed, condition: 0 <= level && level <= 5. The level is {level}."
            self.report("INVALID_ARGUMENT", "IBuilderConfig::setBuilderOptimizationLevel", text)

    def set_flag(self, flag: Any) -> None:
        self._flags.add(flag)

    def clear_flag(self, flag: Any) -> None:
        self._flags.discard(flag)

    def get_flag(self, flag: Any) -> bool:
        return flag in self._flags

    @property
    def flags(self) -> int:
        return sum(1 << int(flag) for flag in self._flags)

    @property
    def flag_names(self) -> set[str]:
        """The flags that are set, by name."""
        return {flag.name for flag in self._flags}

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        if pool_size < 0:
            raise TypeError(f"set_memory_pool_limit(): incompatible function arguments: {pool_size} is negative")
        self._pools[pool] = pool_size

    def get_memory_pool_limit(self, pool: Any) -> int:
        return self._pools.get(pool, 150_000_000_000)

    @property
    def workspace_bytes(self) -> int | None:
        """The limit of the workspace where one was set."""
        return self._pools.get(self.api.enums["MemoryPoolType"].WORKSPACE)

    def add_optimization_profile(self, profile: Any) -> int:
        self.profiles.append(self.api.model(profile))
        return len(self.profiles) - 1

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.profiles)

    def problem(self, inputs: tuple[Tensor, ...]) -> str | None:
        """What contradicts the network's inputs, or None."""
        dynamic = [tensor for tensor in inputs if -1 in tensor.shape]
        if dynamic and not self.profiles:
            return "Network has dynamic or shape inputs, but no optimization profile has been defined."
        for index, profile in enumerate(self.profiles):
            if unknown := set(profile.shapes) - {tensor.name for tensor in inputs}:
                return f"Profile {index} gives shapes for {sorted(unknown)}, which are no inputs of the network."
            for tensor in dynamic:
                if tensor.name not in profile.shapes:
                    return f"Dynamic input {tensor.name} is missing dimensions in profile {index}."
            for tensor in inputs:
                for shape in profile.shapes.get(tensor.name, ()):
                    if not _fits(shape, tensor.shape):
                        return (
                            f"Dimensions in profile {index} are {list(shape)}, "
                            f"but input {tensor.name} has dimensions {list(tensor.shape)}."
                        )
        return None

    def create_timing_cache(self, serialized_timing_cache: memoryview) -> "TimingCache | None":
        """A cache from bytes, an empty one from none; None with an error for bytes that are no cache."""
        if not serialized_timing_cache:
            return TimingCache(self.api, cache_origin(self.api), {})
        try:
            header, _ = decode(CACHE_MAGIC, bytes(serialized_timing_cache))
        except UnreadableError as error:
            self.report("INVALID_ARGUMENT", "IBuilderConfig::createTimingCache", str(error))
            return None
        return TimingCache(self.api, header["origin"], header["entries"])

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        """Refuses a cache of another TensorRT version always, of another GPU unless told to ignore that."""
        model = self.api.model(cache)
        here = cache_origin(self.api)
        same_version = model.origin["version"] == here["version"]
        if not same_version or (model.origin != here and not ignore_mismatch):
            text = f"The timing cache was made by {model.origin}, this is {here}."
            self.report("INVALID_ARGUMENT", "IBuilderConfig::setTimingCache", text)
            return False
        self._cache = model
        return True

    def get_timing_cache(self) -> "TimingCache | None":
        return self._cache

    def remember_timing(self, layer: Layer) -> None:
        """Put a layer into the timing cache, if there is one in use."""
        if self._cache is not None and "DISABLE_TIMING_CACHE" not in self.flag_names:
            self._cache.entries[f"{layer.operator}:{layer.name}"] = f"tactic of {layer.operator}"


class TimingCache(Model):
    public = "ITimingCache"

    def __init__(self, api: Api, origin: dict[str, Any], entries: dict[str, str]) -> None:
        super().__init__(api)
        self.origin = origin
        self.entries = entries

    def serialize(self) -> HostMemory:
        return HostMemory(self.api, encode(CACHE_MAGIC, {"origin": self.origin, "entries": self.entries}))

    def combine(self, input_cache: Any, ignore_mismatch: bool) -> bool:
        other = self.api.model(input_cache)
        if other.origin != self.origin and not ignore_mismatch:
            return False
        self.entries |= other.entries
        return True

    def reset(self) -> bool:
        self.entries = {}
        return True


def cache_origin(api: Api) -> dict[str, Any]:
    """What a timing cache is valid for, ready for JSON."""
    machine = api.machine
    return {"version": api.version, "gpu": machine.gpu, "compute_capability": list(machine.compute_capability)}


def _fits(shape: Shape, wanted: Shape) -> bool:
    return len(shape) == len(wanted) and all(
        size == fixed if fixed != -1 else size >= 0 for size, fixed in zip(shape, wanted, strict=True)
    )


MODELS: tuple[type[Model], ...] = (OptimizationProfile, BuilderConfig, TimingCache)
