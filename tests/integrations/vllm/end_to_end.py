"""Real vLLM on the CPU with our plugin against our own `load_model`: run.sh makes the environment and runs this.

Each case quantizes a model, writes the directory, and asks both for greedy tokens of the same prompts in the same
dtype; a case passes if they are equal token by token. It also counts the bytes that vLLM's model holds:
packed weights must be the only copy. At the end one HTTP request goes to `vllm serve`.

    python -m tests.integrations.vllm.end_to_end [--cases NAME,...] [--skip-real] [--skip-server]
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
from typing import Any

# One thread, bound nowhere: the models are tiny, and threads that wait for each other's cores take minutes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import torch

import qkernels as qk
from qkernels.embedding import QuantEmbedding
from tests.tiny import ids, tiny_model, tiny_tokenizer

#: vLLM's attention on the CPU wants heads of 32 or more
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
NEW = 12


@dataclass(frozen=True)
class Case:
    """asked: whether `quantization="qkernels"` must be said, because vLLM has a method of the checkpoint's."""

    name: str
    format: str
    params: dict[str, Any] = field(default_factory=dict)
    asked: bool = True
    dtype: str = "float32"


CASES = [
    Case("gptq", "gptq", {"group_size": 64}),
    Case("gptq 3 bits, asymmetric", "gptq", {"bits": 3, "group_size": 64, "symmetric": False}),
    Case("gptq act-order", "gptq", {"group_size": 64, "act_order": True}),
    Case("awq", "awq", {"group_size": 64}),
    Case("awq in bfloat16", "awq", {"group_size": 64}, dtype="bfloat16"),
    Case("compressed-tensors pack-quantized", "pack_quantized", {"group_size": 64}),
    Case("compressed-tensors int-quantized", "w8a8"),
    Case("compressed-tensors float-quantized", "fp8"),
    Case("compressed-tensors float-quantized, dynamic", "fp8", {"activation": "dynamic"}),
    Case("fine-grained fp8", "fp8", {"granularity": "block", "activation": "dynamic"}),
    Case("bitsandbytes nf4", "nf4", asked=False),
    Case("bitsandbytes nf4, double quantization", "nf4", {"double_quant": True}, asked=False),
    Case("bitsandbytes fp4", "fp4", asked=False),
    Case("bitsandbytes int8", "int8", asked=False),
    Case("spqr", "spqr", asked=False),
    Case("quip", "quip", asked=False),
    Case("quip_sharp", "quip_sharp", asked=False),
    Case("q8_0", "q8_0", asked=False),
    Case("q4_k_m", "q4_k_m", asked=False),
    Case("q4_k_m in bfloat16", "q4_k_m", asked=False, dtype="bfloat16"),
]


def make(case: Case, directory: Path) -> None:
    model = tiny_model(**SIZES).to(getattr(torch, case.dtype))
    if case.format == "q4_k_m":  # as llama.cpp has it: the embedding is packed and tied
        qk.quantize_model(model, "q4_k_m", progress=False)
        embedding = QuantEmbedding(qk.quantize(model.get_input_embeddings().weight, "q6_k"), model.dtype)
        model.set_input_embeddings(embedding)
        model.set_output_embeddings(qk.QuantLinear(embedding.packed))
    else:
        qk.quantize_model(model, case.format, progress=False, **case.params)
    qk.save_model(model, directory, tiny_tokenizer())


def prompts(count: int = 3) -> list[list[int]]:
    return [ids(5 + 9 * i, seed=i + 1).tolist() for i in range(count)]


@torch.no_grad()
def ours(directory: Path, dtype: str, asked: list[list[int]], count: int) -> tuple[list[list[int]], int]:
    """(greedy continuations by our own load_model, bytes it holds)."""
    model = qk.load_model(directory, dtype=getattr(torch, dtype))
    held = _bytes(model)
    found = []
    for prompt in asked:
        tokens = torch.tensor([prompt])
        out = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=count, min_new_tokens=count,
            do_sample=False, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        found.append(out[0, len(prompt) :].tolist())
    return found, held


def _bytes(model: torch.nn.Module) -> int:
    """Bytes of weights: parameters and buffers, shared memory once, tables of the rotary embedding left out."""
    seen: dict[int, int] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "rotary" not in name and "cos_sin" not in name:
            seen[tensor.data_ptr()] = max(seen.get(tensor.data_ptr(), 0), tensor.nbytes)
    return sum(seen.values())


def theirs(
    directory: Path, asked: bool, dtype: str, texts: list[list[int]], count: int
) -> tuple[list[list[int]], int]:
    """(greedy continuations by vLLM, bytes its model holds)."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        str(directory), quantization="qkernels" if asked else None, dtype=dtype, max_model_len=256,
        enforce_eager=True, max_num_batched_tokens=256, max_num_seqs=8,
    )  # fmt: skip
    sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": t} for t in texts], sampling, use_tqdm=False)
    held = llm.apply_model(_bytes)[0]
    found = [list(output.outputs[0].token_ids) for output in outputs]
    del llm
    cleanup_dist_env_and_memory()
    return found, held


def check(name: str, directory: Path, asked: bool, dtype: str, texts: list[list[int]], count: int) -> bool:
    begin = time.monotonic()
    want, our_bytes = ours(directory, dtype, texts, count)
    found, their_bytes = theirs(directory, asked, dtype, texts, count)
    same = sum(a == b for w, f in zip(want, found, strict=True) for a, b in zip(w, f, strict=True))
    total = sum(map(len, want))
    # vLLM pads the vocabulary to a multiple of 64 and holds nothing else that ours does not.
    lean = their_bytes <= our_bytes * 1.01 + 64 * 4096
    ok = want == found and lean
    print(
        f"| {name} | {dtype} | {same}/{total} | {their_bytes:,} | {our_bytes:,} | "
        f"{time.monotonic() - begin:.0f} s | {'ok' if ok else 'FAILED'} |",
        flush=True,
    )
    return ok


def real(work: Path) -> list[tuple[str, Path, bool, str]]:
    """SmolLM2-135M in the three formats of docs/serving.md: (name, directory, asked, dtype)."""
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
        found.append((name, directory, asked, "float32"))
    gguf = common.model_path("smollm2-135m")
    qk.save_model(qk.load_model(gguf), work / "gguf", qk.checkpoints.load_tokenizer(gguf))
    found.append((f"{gguf.name}, its own bytes", work / "gguf", False, "float32"))
    return found


def serve(directory: Path, port: int = 8765) -> bool:
    """Start `vllm serve`, ask it once over HTTP, print what it says."""
    command = [
        str(Path(sys.executable).with_name("vllm")), "serve", str(directory), "--served-model-name", "tiny",
        "--port", str(port), "--dtype", "bfloat16", "--max-model-len", "256", "--enforce-eager",
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
    body = {"model": "tiny", "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as reply:
        answer = json.load(reply)
    print(f"\n$ vllm {' '.join(command[1:2])} DIR {' '.join(command[3:])}")
    print(f"POST /v1/completions {json.dumps(body)}")
    print(f"-> {reply.status} {json.dumps(answer['choices'][0]['text'])}, usage {answer['usage']}")
    return reply.status == 200 and answer["usage"]["completion_tokens"] >= 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cases", help="names separated by ';' [all]")
    parser.add_argument("--skip-real", action="store_true", help="no SmolLM2-135M")
    parser.add_argument("--skip-server", action="store_true")
    options = parser.parse_args()
    chosen = [c for c in CASES if options.cases is None or c.name in options.cases.split(";")]
    work = Path(tempfile.mkdtemp(prefix="qkernels-vllm-"))
    ok = True
    try:
        print("| checkpoint | dtype | equal tokens | bytes in vLLM | bytes in load_model | time | |")
        print("| --- | --- | ---: | ---: | ---: | ---: | --- |", flush=True)
        for i, case in enumerate(chosen):
            directory = work / f"case-{i}"
            make(case, directory)
            ok &= check(case.name, directory, case.asked, case.dtype, prompts(), NEW)
        served = work / "case-0"
        if not options.skip_real:
            text = [[504, 3575, 282, 4649, 314], [788, 260, 1018]]
            for name, directory, asked, dtype in real(work):
                ok &= check(name, directory, asked, dtype, text, 8)
            served = work / "gguf"
        if not options.skip_server:
            ok &= serve(served)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print("\nall equal" if ok else "\nFAILED")
    sys.exit(not ok)


if __name__ == "__main__":
    main()
