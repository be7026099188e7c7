"""The plan for a machine with a GPU: the calls, the parts of each, and the commands of each part.

To add a part, add an entry to PARTS. `python -m bench.gpu --plan` prints the plan as a table.
"""

from __future__ import annotations

from dataclasses import dataclass, field

#: seconds for all parts of a call
CALL_SECONDS = 225
#: formats of the main races
MAIN = "gptq:bits=4,group_size=128,nf4,q4_k,w8a8,fp8:activation=dynamic"
#: formats whose kernels changed last: they go through compute-sanitizer in the first call
NEWEST = "gptq:bits=4,group_size=128,quip_sharp:bits=4,w8a8"
MODEL_SIZE, PROMPT, BATCHES = "8b", 2048, (1, 16)
MODEL_FORMATS = ("bf16", "gptq:bits=4,group_size=128", "nf4", "q4_k", "fp8:activation=dynamic")


@dataclass(frozen=True)
class Command:
    """One command that runs Python.

    words: arguments of Python, as one string. Each word may hold {out}, the folder of results;
    {seconds}, those left for the command; {jobs}, the number of processes that compile kernels
    beforehand: 1 if the parcel has all of them.
    most: seconds after which the command is stopped.
    tiny: arguments on a machine without a GPU; "" if there is nothing to do.
    prefix: program that runs Python, with its options.
    variables: environment variables.
    label: name of the command in reports of a failure.
    """

    words: str
    most: int
    tiny: str
    prefix: str = ""
    variables: dict[str, str] = field(default_factory=dict)
    label: str = ""


@dataclass(frozen=True)
class Race:
    """The arguments of `python -m bench`."""

    suite: str
    sizes: str
    rows: str
    peers: str = "none"
    backends: str = "cuda,triton"
    jobs: str = "12"

    @property
    def counts(self) -> list[int]:
        """The values of M."""
        return [int(m) for m in self.rows.split(",")]

    def command(self, name: str, most: int, **variables: str) -> Command:
        """The command of this race, with results in NAME.json."""
        words = (
            f"-m bench --suite {self.suite} --shapes {self.sizes} --rows {self.rows} "
            f"--peers {self.peers} --repeats 11 --jobs {self.jobs} --deadline {{seconds}} "
            f"--name {name} --output {{out}} --no-page"
        )
        return Command(
            f"{words} --backend {self.backends}",
            most,
            f"{words} --backend triton --tiny",
            "",
            variables,
        )


@dataclass(frozen=True)
class Part:
    """One part of the plan.

    about: what it measures. expected: seconds on an H200 with a full parcel. race: the arguments,
    if the part is a race. tail: the end of its output counts most, not the beginning.

    "smoke" took 92 s on an H200. A race takes 1.7 s for each contestant and shape, and 20 s to
    import GPTQModel. The seconds of sanitizers and models are guesses.
    """

    about: str
    expected: int
    commands: tuple[Command, ...]
    race: Race | None = None
    tail: bool = False


def _race(about: str, expected: int, name: str, most: int, race: Race) -> Part:
    return Part(about, expected, (race.command(name, most),), race)


def _sanitizer(tool: str, expected: int) -> Part:
    checked = "-m bench.sanitized --seconds {seconds}"
    return Part(
        f"compute-sanitizer's {tool} on the newest kernels",
        expected,
        (
            Command(
                f"{checked} --backends cuda,triton --formats {NEWEST}",
                60,
                f"{checked} --backends triton --formats nf4" if tool == "memcheck" else "",
                f"compute-sanitizer --tool {tool} --error-exitcode 9 --print-limit 20",
                # torch's allocator would hide a read past the end of a tensor, because it gives
                # out parts of larger blocks
                {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            ),
        ),
        tail=True,
    )


def _model(spec: str) -> Command:
    """The command for one format, so that a format that fails stops no other."""
    words = f"-m bench.llm --modes eager,graph --formats {spec} --output {{out}}/model.json"
    batches = ",".join(map(str, BATCHES))
    return Command(
        f"{words} --size {MODEL_SIZE} --prompt {PROMPT} --batches {batches}",
        75,
        f"{words} --size tiny --backend triton" if spec in ("bf16", "nf4") else "",
        label=spec,
    )


#: test files whose tensors are on the GPU, the riskiest first; the other files test on the CPU
GPU_TESTS = """
tests/gpu tests/kernels/test_launch.py tests/cuda/test_launch.py tests/cuda/test_hopper.py
tests/cuda/test_weight_only.py tests/cuda/test_eight_bit.py tests/cuda/test_transforms.py
tests/cuda/test_slices.py tests/kernels/test_weight_only.py tests/kernels/test_eight_bit.py
tests/kernels/test_decoders.py tests/kernels/test_activations.py tests/kernels/test_incoherent.py
tests/kernels/test_experts.py tests/ops/test_fused.py tests/nn/test_linear.py
tests/kernels/test_graphs.py tests/kernels/test_memory.py tests/kernels/test_batch_invariant.py
"""
_PYTEST = "-m pytest -p no:cacheprovider --tb=short"
#: decode with PDL and without
_PDL = Race(
    "gptq:bits=4,group_size=128,q4_k,w8a8,quip_sharp",
    "square,4096x14336",
    "1,16",
    backends="triton",
)

PARTS: dict[str, Part] = {
    "smoke": Part(
        "every kernel at a real and an odd shape: right, same bits each time, in graphs and chains",
        95,
        (
            Command(
                "-m bench.smoke --output {out} --seconds {seconds} --jobs 14",
                130,
                "-m bench.smoke --output {out} --seconds {seconds} --tiny --formats nf4 "
                "--backends triton",
            ),
        ),
    ),
    "memcheck": _sanitizer("memcheck", 35),
    "racecheck": _sanitizer("racecheck", 40),
    "race": _race(
        "five formats, both languages, 8192x8192, against torch, Marlin, Humming, bitsandbytes",
        65, "race", 110,
        Race(MAIN, "square", "1,8,16,64,256,1024,4096", "torch,gptqmodel,humming,bitsandbytes",
             jobs="{jobs}"),
    ),
    "llama": _race(
        "the same on Llama-3-8B's linears, against torch, Marlin, bitsandbytes",
        140, "llama", 170,
        Race(MAIN, "llama-3-8b", "1,8,16,64,256,1024,4096", "torch,gptqmodel,bitsandbytes",
             jobs="{jobs}"),
    ),
    "gemlite": _race(
        "GemLite, which tunes at its first calls: last, so that nobody waits for it",
        40, "gemlite", 110,
        Race("gptq:bits=4,group_size=128,w8a8,fp8:activation=dynamic", "square", "1,16,64,256,4096",
             "gemlite", "triton"),
    ),
    "model": Part(
        "Llama-3-8B's shape: tokens a second of decoding and of a prompt, memory",
        130,
        tuple(_model(spec) for spec in MODEL_FORMATS),
    ),
    "build": Part(
        "compile the CUDA extension, if the parcel has none",
        200,
        (Command("-m bench.gpu.build", 300, "-m bench.gpu.build --tiny"),),
    ),
    "tests": Part(
        "the tests whose tensors are on the GPU",
        200,
        (
            Command(
                # the timeout ends a worker process whose kernel hangs; xdist starts another
                f"{_PYTEST} -n 10 --maxfail 200 --timeout 150 --timeout-method thread {GPU_TESTS}",
                300,
                f"{_PYTEST} tests/bench/test_bench.py -k shapes",
                "", {"QKERNELS_FAILURES": "{out}/failures.txt"},
            ),
        ),
        tail=True,
    ),
    "weight_only": _race(
        "GPTQ, AWQ and bitsandbytes' formats, of every width", 120, "weight_only", 200,
        Race("weight_only", "square,4096x14336", "1,4,16,64,256,4096"),
    ),
    "eight_bit": _race(
        "int8 and FP8, with every kind of scale", 100, "eight_bit", 200,
        Race("eight_bit", "square,4096x14336", "1,4,16,64,256,4096", "torch"),
    ),
    "gguf": _race(
        "GGUF's types", 120, "gguf", 200, Race("gguf", "square,4096x14336", "1,16,64,256,4096")
    ),
    "lowbit": _race(
        "SpQR, QuIP and QuIP#", 90, "lowbit", 200,
        Race("lowbit", "square", "1,16,64,256,4096", backends="cuda,triton,reference"),
    ),
    "early": Part(
        "decoding with programmatic dependent launch (PDL), and without",
        60,
        (_PDL.command("early", 60), _PDL.command("early-off", 60, QKERNELS_PDL="0")),
        _PDL,
    ),
    "tune": Part(
        "which configurations of the Triton kernels are fastest",
        200,
        (
            Command(
                "-m bench.tune --output {out}/tuned.jsonl --seconds {seconds}",
                220,
                "-m bench.tune --output {out}/tuned.jsonl --seconds 60 --tiny",
            ),
        ),
    ),
}  # fmt: skip

#: the first three calls; the fourth, with --part, tests the fix of the worst finding
CALLS: dict[str, tuple[str, ...]] = {
    "smoke": ("smoke", "memcheck", "racecheck"),
    "race": ("race", "llama"),
    "model": ("model", "gemlite"),
}


def table() -> str:
    """A table of calls and parts, with the seconds that each is expected to take."""
    lines = ["call   part         seconds  what it tells"]
    for call, names in CALLS.items():
        for name in names:
            lines.append(f"{call:6} {name:12} {PARTS[name].expected:7}  {PARTS[name].about}")
        lines.append(
            f"{call:6} {'all':12} {sum(PARTS[n].expected for n in names):7}  of {CALL_SECONDS}"
        )
    others = [name for name in PARTS if not any(name in names for names in CALLS.values())]
    lines += [f"       {name:12} {PARTS[name].expected:7}  {PARTS[name].about}" for name in others]
    return "\n".join(lines)
