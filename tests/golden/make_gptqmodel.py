"""Make tests/golden/gptqmodel-*: GPTQModel quantizes a tiny Llama and computes logits.

Run by hand, in an environment of its own that has gptqmodel (7.7.0 here, torch backend, CPU):

    GPTQMODEL_CPU_WORKERS=2 python -m tests.golden.make_gptqmodel           # make them
    GPTQMODEL_CPU_WORKERS=2 python -m tests.golden.make_gptqmodel --check   # read what we write
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..tiny import ids, tiny_model, tiny_tokenizer

HERE = Path(__file__).parent
KINDS = {
    "gptq-act-order": {"bits": 4, "group_size": 32, "desc_act": True, "sym": True},
    "gptq-8bit-mixed": {"bits": 4, "group_size": 32, "desc_act": False, "sym": True,
                        "dynamic": {"+:.*down_proj": {"bits": 8},
                                    "-:.*layers\\.1\\.mlp\\.up_proj": {}}},
    "awq": {"bits": 4, "group_size": 32, "quant_method": "awq", "format": "gemm"},
}  # fmt: skip


def check() -> None:
    """GPTQModel loads checkpoints of qkernels; compare its logits with ours, both float16."""
    from gptqmodel import BACKEND, GPTQModel

    import qkernels as qk

    for format, params in (
        ("gptq", {"group_size": 32}),
        ("gptq", {"group_size": 32, "act_order": True}),
        ("gptq", {"group_size": 32, "bits": 8}),
        ("gptq", {"group_size": 32, "symmetric": False, "checkpoint_format": "gptq_v2"}),
        ("awq", {"group_size": 32}),
    ):
        ours = tiny_model(tie_word_embeddings=False).half()
        qk.quantize_model(
            ours, format, progress=False, skip=["model.layers.1.mlp.down_proj"], **params
        )
        with tempfile.TemporaryDirectory() as scratch:
            qk.save_model(ours, scratch, tiny_tokenizer())
            backend = BACKEND.TORCH_AWQ if format == "awq" else BACKEND.TORCH
            theirs = GPTQModel.load(
                scratch, backend=backend, device="cpu", dtype=torch.float16
            ).model
            with torch.no_grad():
                a, b = (model(ids(20)[None]).logits.float() for model in (ours, theirs))
        error = (a - b).norm() / b.norm()
        print(f"CHECK {format} {params}: relative difference of the logits {error:.1e}")
        assert error < 5e-3
        assert type(theirs.model.layers[1].mlp.down_proj) is torch.nn.Linear


def main() -> None:
    if sys.argv[1:] == ["--check"]:
        return check()
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    text = ["".join(map(chr, ids(64, seed).tolist())) for seed in range(64)]
    for name in sys.argv[1:] or KINDS:
        target = HERE / f"gptqmodel-{name}"
        with tempfile.TemporaryDirectory() as scratch:
            # its AWQ takes 64 output features at a time
            tiny_model(
                tie_word_embeddings=False, num_key_value_heads=4, intermediate_size=128
            ).half().save_pretrained(scratch)
            tiny_tokenizer().save_pretrained(scratch)
            model = GPTQModel.load(scratch, QuantizeConfig(**KINDS[name]), device="cpu")
            model.quantize(text, batch_size=4)
            model.save(str(target))
        awq = name.startswith("awq")
        backend = BACKEND.TORCH_AWQ if awq else BACKEND.TORCH
        again = GPTQModel.load(str(target), backend=backend, device="cpu", dtype=torch.float16)
        with torch.no_grad():
            logits = again.model(ids(20)[None]).logits
        tensors = load_file(target / "model.safetensors")
        for extra in target.iterdir():
            if extra.name not in ("config.json", "model.safetensors"):
                extra.unlink()
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
        save_file({"logits": logits.contiguous()}, target / "logits.golden")
        print(target, json.loads((target / "config.json").read_text())["quantization_config"])


if __name__ == "__main__":
    main()
