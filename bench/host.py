"""Measure the host time of a call: dispatch alone, and with each backend's launcher, on this CPU.

    python -m bench.host [--markdown] [--output FILE.json]

Nothing runs on a GPU. "dispatch" calls a kernel that does nothing. "triton" runs the real launchers
and triton's own launch code up to the driver: kernels are compiled for sm_90, and a stand-in for
the driver takes the launch and does nothing (so not under TRITON_INTERPRET=1). "cuda" runs the real
launchers up to the extension. The times leave out cuLaunchKernel and the C code before it. Torch's
CPU allocator and stream look-up stand in for the CUDA ones.
"""

from __future__ import annotations

import inspect
import json
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import qkernels as qk
from qkernels.backends import cuda, registry, triton
from qkernels.backends.cuda import launch as cuda_launch
from qkernels.backends.problem import Problem, problem_of
from qkernels.quantizers.specs import FormatSpec

#: formats whose launchers are measured, with their parameters
CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("gptq", {"bits": 4, "group_size": 128}),
    ("gptq", {"bits": 4, "group_size": 128, "act_order": True}),
    ("nf4", {"double_quant": True}),
    ("q4_k", {}),
    ("w8a8", {}),
    ("int8", {}),
    ("fp8", {"activation": "dynamic"}),
    ("spqr", {}),
    ("quip_sharp", {}),
)
SHAPE = (512, 1024)
#: formats of whole expert layers, which start five to seven kernels
LAYERS: tuple[tuple[str, dict[str, Any]], ...] = (("awq", {}), ("fp8", {"activation": "dynamic"}))
#: microseconds a call may take, by bench/targets.md
TARGET = 10.0


def microseconds(call: Callable[[], object], calls: int = 200, rounds: int = 40) -> float:
    """Mean time of a call in the fastest of many short rounds.

    The fastest round is the one that nothing else on the machine interrupted.
    """
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter() - start) / calls)
    return best * 1e6


# ---------------------------------------------------------------------- stand-ins
@contextmanager
def only(kernel: registry.Kernel) -> Iterator[None]:
    """Within the context, dispatch knows `kernel` alone, on every device."""
    kernels, registry._KERNELS = registry._KERNELS, {kernel.name: kernel}
    registry.choose.cache_clear()
    try:
        yield
    finally:
        registry._KERNELS = kernels
        registry.choose.cache_clear()


class NullDriver:
    """A driver for triton: a GPU of sm_90 that takes every launch and runs none.

    launches: (name, grid, arguments) of each launch, with `record`.
    """

    class Utils:
        def load_binary(self, name: str, binary: bytes, *rest: Any) -> tuple[Any, ...]:
            function = f"{name} {hash(binary):x}"  # kernels of one name differ in their binaries
            return function, function, 0, 0, 1024  # module, function, registers, spills, threads

        def unload_module(self, module: Any) -> None:
            pass

        def get_device_properties(self, device: int) -> dict[str, int]:
            return {"max_shared_mem": 227 * 1024}

    def __init__(self, record: bool = False) -> None:
        self.utils = self.Utils()
        self.launches: list[tuple[str, tuple[int, int, int], tuple[Any, ...]]] = []
        launches = self.launches

        class Launcher:
            def __init__(self, source: Any, metadata: Any) -> None:
                pass

            def __call__(
                self, x: int, y: int, z: int, stream: int, function: str, *rest: Any
            ) -> None:
                if record:
                    launches.append((function, (x, y, z), rest[4:]))

        self.launcher_cls = Launcher if record else _launcher_class() or Launcher

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


def _launcher_class() -> Any:
    """Triton's own launcher up to the call of C code, which is replaced by nothing.

    None for a version of triton whose `__call__` is not the known one.
    """
    from triton.backends.nvidia.driver import CudaLauncher

    if "self.launch(gridX, gridY, gridZ, stream, function" not in inspect.getsource(
        CudaLauncher.__call__
    ):
        return None

    class Launcher(CudaLauncher):
        def __init__(self, source: Any, metadata: Any) -> None:
            self.gsan_enabled, self.num_ctas = False, metadata.num_ctas
            self.global_scratch_size = metadata.global_scratch_size
            self.global_scratch_align = metadata.global_scratch_align
            self.profile_scratch_size = metadata.profile_scratch_size
            self.profile_scratch_align = metadata.profile_scratch_align
            self.launch_cooperative_grid, self.launch_pdl = (
                metadata.launch_cooperative_grid,
                metadata.launch_pdl,
            )
            self.arg_annotations = self.kernel_signature = ()
            self.launch = _nothing

    return Launcher


def _nothing(*arguments: Any) -> None:
    pass


@contextmanager
def null_driver(record: bool = False) -> Iterator[NullDriver]:
    """Within the context, triton launches on a `NullDriver`.

    Raises:
        RuntimeError: triton interprets kernels, so it launches nothing.
    """
    if triton.interpreted():
        raise RuntimeError("TRITON_INTERPRET is set: unset it to measure what launching costs")
    from triton.runtime import driver

    null = NullDriver(record)
    driver.set_active(null)  # type: ignore[arg-type]
    try:
        yield null
    finally:
        driver._active = None


def launcher_of(
    backend: str, name: str, params: dict[str, Any], rows: int = 1
) -> registry.Kernel | None:
    """The kernel whose launcher serves this format and number of rows, made to accept any device.

    None if the backend has none.
    """
    p = qk.quantize(torch.zeros(SHAPE), name, **params)
    problem = problem_of(p, rows, torch.float16, torch.device("cpu"))
    layout = qk.formats.get(name).kernel_layout(p.params)
    for kernel in registry.kernels():
        if (kernel.backend, kernel.layout) == (backend, layout) and not _rejection(kernel, problem):
            return _accepting_all(kernel)
    return None


def _accepting_all(kernel: registry.Kernel) -> registry.Kernel:
    """A copy of the kernel that accepts every problem on any device."""

    def nothing(*problem: Problem) -> None:
        return None

    return replace(kernel, unavailable=nothing, rejects=nothing, automatic=nothing)


def _rejection(kernel: registry.Kernel, problem: Problem) -> str | None:
    """Why the kernel would reject the problem on a GPU; None if it would not."""
    if kernel.backend != "cuda":
        return None
    before, cuda.emulator = cuda.emulator, lambda *operands: ""  # so the CPU counts as a device
    try:
        return kernel.rejects(problem)
    finally:
        cuda.emulator = before


@contextmanager
def null_extension() -> Iterator[None]:
    """Within the context, the CUDA backend sees a GPU 0 of sm_90, and its kernels do nothing."""

    class Extension:
        @staticmethod
        def run(name: str, address: int) -> str:
            return ""

    stand_ins: tuple[tuple[Any, str, Any], ...] = (
        (cuda.build, "extension", lambda: Extension),
        (cuda, "stream_of", lambda index: 0),
        (cuda, "current_device", lambda: -1),
        (cuda_launch, "supports_pdl", lambda index: True),
    )
    real = [getattr(where, name) for where, name, _ in stand_ins]
    for where, name, value in stand_ins:
        setattr(where, name, value)
    try:
        yield
    finally:
        for (where, name, _), value in zip(stand_ins, real, strict=True):
            setattr(where, name, value)


# ---------------------------------------------------------------------- measuring
def measure() -> dict[str, float]:
    """Microseconds of dispatch, by entry point: a call whose kernel does nothing."""
    y = torch.empty(1, 64)
    null = registry.Kernel(
        "null", "cuda", registry.ANY_LAYOUT, lambda: None, lambda problem: None, lambda *operands: y
    )
    with only(null), torch.inference_mode():
        p = qk.quantize(torch.randn(64, 256), "gptq", group_size=64)
        layer, x, bias = qk.QuantLinear(p, torch.zeros(64)), torch.randn(1, 256), torch.zeros(64)
        spec, storage = qk.ops.matmul.spec_of(p), list(p.storage.values())
        return {
            "qkernels.matmul": microseconds(lambda: qk.matmul(x, p, bias)),
            "QuantLinear": microseconds(lambda: layer(x)),
            "torch.ops.qkernels.matmul": microseconds(
                lambda: torch.ops.qkernels.matmul(x, storage, bias, spec, "auto", False)
            ),
        }


def launchers(backend: str, rows: int = 1) -> dict[str, float]:
    """Format that `backend` has kernels for -> microseconds of `matmul` with the real launcher."""
    times = {}
    for name, params in CASES:
        kernel = launcher_of(backend, name, params, rows)
        if kernel is None:
            continue
        p = qk.quantize(torch.randn(SHAPE), name, **params)
        x = torch.randn(rows, SHAPE[1]).half()
        with only(kernel), torch.inference_mode():
            for _ in range(3):
                qk.matmul(x, p)
            times[str(FormatSpec(name, params))] = microseconds(lambda p=p, x=x: qk.matmul(x, p))
            if "act_order" in params:
                continue
            operands = (x, list(p.storage.values()), None, qk.ops.matmul.spec_of(p), "auto", False)
            for _ in range(3):
                torch.ops.qkernels.matmul(*operands)
            times[f"torch.ops: {FormatSpec(name, params)}"] = microseconds(
                lambda operands=operands: torch.ops.qkernels.matmul(*operands)
            )
    return times


def layers() -> dict[str, float]:
    """Microseconds of `fused_moe` for one token with the Triton launchers, by format."""
    times = {}
    for name, params in LAYERS:
        gate_up, down = (
            qk.quantize_experts(torch.randn(8, *shape), name, **params)
            for shape in ((512, 256), (256, 256))
        )
        layout = qk.formats.get(name).kernel_layout(gate_up.params)
        kernel = next(
            k for k in registry.experts_kernels() if (k.backend, k.layout) == ("triton", layout)
        )
        x, ids, weights = torch.randn(1, 256).half(), torch.tensor([[0, 1]]), torch.rand(1, 2)
        operands = (x, gate_up, down, weights, ids)
        with only(_accepting_all(kernel)), torch.inference_mode():
            for _ in range(3):
                qk.fused_moe(*operands)
            times[f"fused_moe: {FormatSpec(name, params)}"] = microseconds(
                lambda operands=operands: qk.fused_moe(*operands)
            )
    return times


def everything() -> dict[str, dict[str, float]]:
    """Backend -> call -> microseconds. A backend that cannot be measured here is left out."""
    times = {"dispatch": measure()}
    if triton._installed() and not triton.interpreted():
        with null_driver():
            times["triton"] = launchers("triton") | layers()
    with null_extension():
        times["cuda"] = launchers("cuda")
    return times


def cpu_name() -> str:
    """The CPU's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.partition(":")[2].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main(
    markdown: bool = False,
    output: Annotated[Path | None, typer.Option(help="JSON file.")] = None,
) -> None:
    """Measure the microseconds of host time of a call, outside CUDA graphs."""
    torch.set_num_threads(1)
    times = everything()
    versions = {"cpu": cpu_name(), "python": platform.python_version(), "torch": torch.__version__}
    if triton._installed():
        versions["triton"] = __import__("triton").__version__
    if markdown:
        print(", ".join(f"{name} {value}" for name, value in versions.items()) + "\n")
        print(f"| | call | us | <= {TARGET:.0f} |\n| --- | --- | ---: | --- |")
    for backend, calls in times.items():
        for name, value in calls.items():
            within = "yes" if value <= TARGET else "**no**"
            print(
                f"| {backend} | {name} | {value:.1f} | {within} |"
                if markdown
                else f"{backend:9} {name:44} {value:6.1f} us"
            )
    if "triton" not in times and not markdown:
        print(
            "triton's launchers: not measured (TRITON_INTERPRET is set, or triton is not installed)"
        )
    if output is not None:
        output.write_text(
            json.dumps({"environment": versions, "microseconds": times}, indent=1) + "\n"
        )


if __name__ == "__main__":
    typer.run(main)
