"""Real vLLM on the CPU with our plugin, against our own `load_model`.

    python -m tests.integrations.vllm.end_to_end [--cases NAME,...] [--skip-real] [--skip-server]

run.sh makes the environment and runs this. Each case quantizes a model, writes the directory, and
asks both programs for greedy tokens of the same prompts in the same dtype. A float32 case passes if
all tokens are equal. In bfloat16 two programs round differently, plain weights included (the
control), so there the first token that differs must be a near-tie in our own logits. The bytes of
vLLM's model are counted, too: packed weights must be the only copy. Then bad input must be refused
before weights load, and one HTTP request goes to `vllm serve`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# One thread, bound nowhere: the models are tiny, and threads that wait for each other's cores take
# minutes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # functions go to other processes
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import qkernels as qk
from qkernels.nn.embedding import QuantEmbedding
from tests.moe_checkpoint import save_moe
from tests.tiny import ids, tiny_model, tiny_tokenizer

#: vLLM's attention on the CPU wants heads of 32 or more
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
NEW = 12
#: of the largest logit: a few units in the last place of bfloat16
NEAR = 0.02


@dataclass(frozen=True)
class Case:
    """One comparison with vLLM.

    asked: whether `quantization="qkernels"` must be given, because vLLM has a method for the
    checkpoint. alone: prompts go one at a time, because the outlier columns of LLM.int8() are those
    of all rows of a batch. batch_invariant: our layers see vLLM's switch on (the rest of that mode
    of vLLM needs a GPU). skip: modules left alone. head: the output projection is packed, too, and
    not tied. moe: a mixture of experts, mixtral or qwen3_moe, against transformers with the same
    values dequantized (our own load_model reads no such files). down: format of the experts' down
    projections. parallel: whether each process has some experts, not a part of each expert.
    """

    name: str
    format: str
    params: dict[str, Any] = field(default_factory=dict)
    asked: bool = True
    dtype: str = "float32"
    processes: int = 1
    batch_invariant: bool = False
    alone: bool = False
    skip: tuple[str, ...] = ()
    head: bool = False
    moe: str = ""
    down: str | None = None
    parallel: bool = False


CASES = [
    Case("unquantized (control)", "", asked=False),
    Case("unquantized in bfloat16 (control)", "", asked=False, dtype="bfloat16"),
    Case("gptq", "gptq", {"group_size": 64}),
    Case("gptq 3 bits, asymmetric", "gptq", {"bits": 3, "group_size": 64, "symmetric": False}),
    Case("gptq act-order", "gptq", {"group_size": 64, "act_order": True}),
    Case(
        "gptq, layer 1 left alone, head packed",
        "gptq",
        {"group_size": 64},
        skip=("*.layers.1.*",),
        head=True,
    ),
    Case("awq", "awq", {"group_size": 64}),
    Case("awq in bfloat16", "awq", {"group_size": 64}, dtype="bfloat16"),
    Case("compressed-tensors pack-quantized", "pack_quantized", {"group_size": 64}),
    Case("compressed-tensors int-quantized", "w8a8"),
    Case("compressed-tensors float-quantized", "fp8"),
    Case("compressed-tensors float-quantized, dynamic", "fp8", {"activation": "dynamic"}),
    Case("fine-grained fp8", "fp8", {"granularity": "block", "activation": "dynamic"}),
    Case("bitsandbytes nf4", "nf4", asked=False),
    Case(
        "nf4, v_proj and up_proj left alone",
        "nf4",
        asked=False,
        skip=("*.v_proj", "*.up_proj"),
        dtype="bfloat16",
    ),
    Case("bitsandbytes nf4, double quantization", "nf4", {"double_quant": True}, asked=False),
    Case("bitsandbytes fp4", "fp4", asked=False),
    Case("bitsandbytes int8, one at a time", "int8", asked=False, alone=True),
    Case("bitsandbytes int8, batch-invariant", "int8", asked=False, batch_invariant=True),
    Case("spqr", "spqr", asked=False),
    Case("quip", "quip", asked=False),
    Case("quip_sharp", "quip_sharp", asked=False),
    Case("q8_0", "q8_0", asked=False),
    Case("q4_k_m", "q4_k_m", asked=False),
    Case("q4_k_m in bfloat16", "q4_k_m", asked=False, dtype="bfloat16"),
    Case("awq, batch-invariant", "awq", {"group_size": 64}, batch_invariant=True),
    Case(
        "gptq act-order, two processes", "gptq", {"group_size": 64, "act_order": True}, processes=2
    ),
    Case("q5_1, two processes", "q5_1", asked=False, processes=2),
    Case("Mixtral gptq", "gptq", {"group_size": 64}, moe="mixtral"),
    Case("Mixtral gptq act-order", "gptq", {"group_size": 64, "act_order": True}, moe="mixtral"),
    Case("Mixtral awq", "awq", {"group_size": 64}, moe="mixtral"),
    Case("Mixtral pack-quantized", "pack_quantized", {"group_size": 64}, moe="mixtral"),
    Case("Mixtral nf4", "nf4", asked=False, moe="mixtral"),
    Case("Mixtral fp8", "fp8", moe="mixtral"),
    Case("Mixtral fine-grained fp8", "fp8", {"granularity": "block"}, moe="mixtral"),
    Case("Mixtral q4_k, down q8_0", "q4_k", asked=False, moe="mixtral", down="q8_0"),
    Case("Mixtral q8_0, batch-invariant", "q8_0", asked=False, moe="mixtral", batch_invariant=True),
    Case("Qwen3-MoE gptq", "gptq", {"group_size": 64}, moe="qwen3_moe"),
    Case(
        "Qwen3-MoE nf4, double quantization",
        "nf4",
        {"double_quant": True},
        asked=False,
        moe="qwen3_moe",
    ),
    Case("Qwen3-MoE fp8", "fp8", moe="qwen3_moe"),
    Case("Qwen3-MoE gptq, two processes", "gptq", {"group_size": 64}, moe="qwen3_moe", processes=2),
    Case(
        "Qwen3-MoE q5_1, experts in two processes",
        "q5_1",
        asked=False,
        moe="qwen3_moe",
        processes=2,
        parallel=True,
    ),
]


def make(case: Case, directory: Path) -> None:
    if case.moe:
        save_moe(case.moe, case.format, case.params, directory, plain_of(directory), case.down)
        return
    model = tiny_model(**SIZES, tie_word_embeddings=not case.head).to(getattr(torch, case.dtype))
    if case.format == "q4_k_m":  # as llama.cpp has it: the embedding is packed and tied
        qk.quantize_model(model, "q4_k_m", progress=False)
        embedding = QuantEmbedding(
            qk.quantize(model.get_input_embeddings().weight, "q6_k"), model.dtype
        )
        model.set_input_embeddings(embedding)
        model.set_output_embeddings(qk.QuantLinear(embedding.packed))
    elif case.format:
        qk.quantize_model(model, case.format, skip=case.skip, progress=False, **case.params)
    if case.head:
        head = qk.quantize(model.lm_head.weight, case.format, **case.params)
        model.set_output_embeddings(qk.QuantLinear(head))
    qk.save_model(model, directory, tiny_tokenizer())


def plain_of(directory: Path) -> Path:
    """The path of a mixture's dequantized twin."""
    return directory.with_name(f"{directory.name}-plain")


def prompts(count: int = 3) -> list[list[int]]:
    return [ids(5 + 9 * i, seed=i + 1).tolist() for i in range(count)]


@torch.no_grad()
def ours(
    case: Case, directory: Path, asked: list[list[int]], count: int
) -> tuple[Any, list[list[int]]]:
    """(our own load_model or a mixture's dequantized twin, its greedy continuations)."""
    dtype = getattr(torch, case.dtype)
    if case.moe:
        model = AutoModelForCausalLM.from_pretrained(plain_of(directory), dtype=dtype)
    else:
        model = qk.load_model(directory, dtype=dtype)
    found = []
    for prompt in asked:
        tokens = torch.tensor([prompt])
        out = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        found.append(out[0, len(prompt) :].tolist())
    return model, found


@torch.no_grad()
def near_tie(model: Any, prompt: list[int], want: list[int], found: list[int]) -> float:
    """How far our logit of the first other token is below the best, over the largest logit."""
    same = next(i for i, (a, b) in enumerate(zip(want, found, strict=True)) if a != b)
    logits = model(torch.tensor([prompt + want[:same]])).logits[0, -1].float()
    return float((logits.max() - logits[found[same]]) / logits.abs().max())


def _bytes(model: torch.nn.Module) -> int:
    """Bytes of parameters and buffers: shared memory counts once, rotary tables do not count."""
    seen: dict[int, int] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "rotary" not in name and "cos_sin" not in name:
            seen[tensor.data_ptr()] = max(seen.get(tensor.data_ptr(), 0), tensor.nbytes)
    experts = [m.qkernels_experts for m in model.modules() if hasattr(m, "qkernels_experts")]
    return sum(seen.values()) + sum(part.stored_bytes for part in experts)  # type: ignore[union-attr]


def _file_bytes(directory: Path) -> int:
    return sum(
        t.nbytes for file in directory.glob("*.safetensors") for t in load_file(file).values()
    )


def make_llm(
    directory: Path, asked: bool, dtype: str, processes: int = 1, parallel: bool = False
) -> Any:
    from vllm import LLM

    return LLM(
        str(directory), quantization="qkernels" if asked else None, dtype=dtype, max_model_len=256,
        enforce_eager=True, max_num_batched_tokens=256, max_num_seqs=8,
        tensor_parallel_size=processes,
        disable_log_stats=True, enable_expert_parallel=parallel,
    )  # fmt: skip


def invariant_layers(model: torch.nn.Module) -> bool:
    layers = [m for m in model.modules() if isinstance(m, qk.QuantLinear)]
    experts = [m for m in model.modules() if hasattr(m, "qkernels_experts")]
    return bool(layers) and all(
        [*(m.batch_invariant for m in layers), *(m.quant_method.invariant for m in experts)]
    )  # type: ignore[union-attr]


def theirs(
    case: Case, directory: Path, texts: list[list[int]], count: int
) -> tuple[list[list[int]], int, bool]:
    """(greedy continuations by vLLM, bytes of its model, whether it is batch-invariant)."""
    from vllm import SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    import qkernels.integrations.vllm.config as plugin
    import qkernels.integrations.vllm.moe as moe_plugin

    switch = plugin.envs
    plugin.envs = moe_plugin.envs = SimpleNamespace(VLLM_BATCH_INVARIANT=case.batch_invariant)
    try:
        llm = make_llm(directory, case.asked, case.dtype, case.processes, case.parallel)
        sampling = SamplingParams(
            temperature=0, max_tokens=count, ignore_eos=True, detokenize=False
        )
        asked = [{"prompt_token_ids": t} for t in texts]
        groups = [[a] for a in asked] if case.alone else [asked]
        outputs = [o for group in groups for o in llm.generate(group, sampling, use_tqdm=False)]
        held = max(llm.apply_model(_bytes))
        invariant = all(llm.apply_model(invariant_layers))
    finally:
        plugin.envs = moe_plugin.envs = switch
    found = [list(output.outputs[0].token_ids) for output in outputs]
    del llm
    cleanup_dist_env_and_memory()
    return found, held, invariant


def check(case: Case, directory: Path, texts: list[list[int]], count: int) -> bool:
    begin = time.monotonic()
    os.environ["QKERNELS_BATCH_INVARIANT"] = str(int(case.batch_invariant))
    model, want = ours(case, directory, texts, count)
    os.environ["QKERNELS_BATCH_INVARIANT"] = "0"  # vLLM's switch alone must do
    found, their_bytes, invariant = theirs(case, directory, texts, count)
    our_bytes = _file_bytes(directory) if case.moe else _bytes(model)
    pairs = list(zip(texts, want, found, strict=True))
    same = sum(a == b for _, w, f in pairs for a, b in zip(w, f, strict=True))
    gaps = [near_tie(model, t, w, f) for t, w, f in pairs if w != f]
    # vLLM pads the vocabulary to a multiple of 64 and holds nothing else that ours does not.
    lean = their_bytes <= our_bytes * 1.01 + 64 * 4096
    if case.processes > 1:  # each has its half of the linears
        lean = their_bytes < 0.8 * our_bytes
    ok = (not gaps if case.dtype == "float32" else max(gaps, default=0.0) < NEAR) and lean
    ok &= invariant or not case.batch_invariant
    note = f", near-ties {', '.join(f'{gap:.4f}' for gap in gaps)}" if gaps else ""
    print(
        f"| {case.name} | {case.dtype} | {same}/{sum(map(len, want))}{note} | {their_bytes:,} | "
        f"{our_bytes:,} | {time.monotonic() - begin:.0f} s | {'ok' if ok else 'FAILED'} |",
        flush=True,
    )
    return ok


def attempt(case: Case, directory: Path, texts: list[list[int]], count: int) -> bool:
    """`check`, but an error in one case does not stop the others."""
    try:
        return check(case, directory, texts, count)
    except Exception as error:
        print(
            f"| {case.name} | {case.dtype} | | | | | FAILED: {' '.join(str(error).split())[-300:]} "
            "|",
            flush=True,
        )
        return False


def refused(
    name: str, directory: Path, message: str, change: dict[str, Any], processes: int = 1
) -> bool:
    """Whether vLLM ends with our message for a checkpoint with a changed quantization_config."""
    from vllm.distributed import cleanup_dist_env_and_memory

    config = json.loads((directory / "config.json").read_text())
    changed = {**config, "quantization_config": {**config["quantization_config"], **change}}
    (directory / "config.json").write_text(json.dumps(changed))
    try:
        make_llm(directory, True, "float32", processes)
        found = "nothing was refused"
    except Exception as error:
        found = " ".join(str(error).split())
    finally:
        (directory / "config.json").write_text(json.dumps(config))
        cleanup_dist_env_and_memory()
    print(f"bad input, {name}: {found[-300:]}", flush=True)
    return message in found


def real(work: Path) -> list[tuple[Case, Path]]:
    """SmolLM2-135M in the three formats of docs/serving.md."""
    from qkernels.checkpoints import load_tokenizer
    from qkernels.cli import common

    found = []
    for name, format, params, asked in (
        ("SmolLM2-135M awq", "awq", {"group_size": 64}, True),
        ("SmolLM2-135M nf4", "nf4", {"block_size": 64}, False),
    ):
        model, tokenizer = common.load("smollm2-135m", "cpu", "float32")
        qk.quantize_model(model, format, progress=False, **params)
        directory = work / format
        qk.save_model(model, directory, tokenizer)
        found.append((Case(name, format, asked=asked), directory))
    gguf = common.model_path("smollm2-135m")
    qk.save_model(qk.load_model(gguf), work / "gguf", load_tokenizer(gguf))
    found.append((Case(f"{gguf.name}, its own bytes", "", asked=False), work / "gguf"))
    return found


def serve(directory: Path, port: int = 8766) -> bool:
    """Start `vllm serve`, ask it once over HTTP, and print the answer."""
    command = [
        # what `vllm serve` runs; vllm-cpu's own `vllm` looks for a package of the name vllm and
        # ends
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(directory),
        "--served-model-name", "tiny",
        "--quantization", "qkernels", "--host", "127.0.0.1", "--port", str(port), "--dtype",
        "bfloat16", "--max-model-len", "256", "--enforce-eager",
        "--max-num-seqs", "8",
    ]  # fmt: skip
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            return _ask(server, port, command)
        except Exception as error:
            log.seek(0)
            print(log.read().decode(errors="replace")[-4000:])
            print("server:", error)
            return False
        finally:
            server.terminate()
            server.wait(60)


def _ask(server: subprocess.Popen[bytes], port: int, command: list[str]) -> bool:
    url = f"http://127.0.0.1:{port}"
    for _ in range(300):
        if server.poll() is not None:
            raise RuntimeError(f"expected a server, it ended with code {server.returncode}")
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5)
            break
        except OSError:
            time.sleep(2)
    body = {
        "model": "tiny",
        "prompt": "The capital of France is",
        "max_tokens": 8,
        "temperature": 0,
    }
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as reply:
        answer = json.load(reply)
    print(f"\n$ python {' '.join(command[1:4])} DIR {' '.join(command[5:])}")
    print(f"POST /v1/completions {json.dumps(body)}")
    print(f"-> {reply.status} {json.dumps(answer['choices'][0]['text'])}, usage {answer['usage']}")
    return reply.status == 200 and answer["usage"]["completion_tokens"] >= 1


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cases", help="names separated by ';' [all]")
    parser.add_argument("--skip-real", action="store_true", help="no SmolLM2-135M")
    parser.add_argument("--skip-server", action="store_true")
    options = parser.parse_args()
    chosen = [c for c in CASES if options.cases is None or c.name in options.cases.split(";")]
    work = Path(tempfile.mkdtemp(prefix="qkernels-vllm-"))
    ok = True
    try:
        print(
            "| checkpoint | dtype | equal tokens | bytes in vLLM | bytes in load_model | time | |"
        )
        print("| --- | --- | ---: | ---: | ---: | ---: | --- |", flush=True)
        for i, case in enumerate(chosen):
            directory = work / f"case-{i}"
            make(case, directory)
            ok &= attempt(case, directory, prompts(), NEW)
        if options.cases is None:
            make(Case("bad", "gptq", {"group_size": 64}), bad := work / "bad")
            print()
            ok &= refused("8 bits said, 4 there", bad, "gptq: qweight: expected shape", {"bits": 8})
            ok &= refused(
                "an unknown method", bad, "quant_method: expected gptq", {"quant_method": "mystery"}
            )
        served = directory if chosen else work
        if not options.skip_real:
            text = [[504, 3575, 282, 4649, 314], [788, 260, 1018]]
            for case, directory in real(work):
                ok &= attempt(case, directory, text, 8)
            served = work / "gguf"
        if not options.skip_server:
            ok &= serve(served)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print("\nall equal" if ok else "\nFAILED")
    sys.exit(not ok)


if __name__ == "__main__":
    main()
