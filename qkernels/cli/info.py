"""`qkernels info`: what is installed, and which kernels can run here."""

from __future__ import annotations

from typing import Annotated

import typer

from . import common

#: optional packages and what they are for
_OPTIONAL = {
    "triton": "Triton kernels",
    "transformers": "Hugging Face models",
    "accelerate": "Hugging Face models",
    "gguf": "GGUF files",
    "peft": "LoRA adapters",
    "matplotlib": "benchmark plots",
    "bitsandbytes": "comparisons",
    "compressed_tensors": "comparisons",
}


def register(app: typer.Typer) -> None:
    app.command("info")(info)


def info(
    matrix: Annotated[
        bool, typer.Option("--matrix", help="Show what each format supports, on any machine.")
    ] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Write the matrix as a Markdown table.")
    ] = False,
    json: common.JsonOption = False,
) -> None:
    """Show versions, GPUs, storage formats, and which kernels can run here and why others cannot.

    Example: qkernels info --matrix
    """
    if matrix or markdown:
        _write_matrix(markdown, json)
        return
    facts = collect()
    if json:
        common.write_json(facts)
        return
    versions = [[name, value or "not found"] for name, value in facts["versions"].items()]
    common.write_table("Versions", ["", ""], versions, left=2)
    gpus = [
        [str(i), g["name"], g["capability"], common.human_bytes(g["memory"])]
        for i, g in enumerate(facts["gpus"])
    ]
    common.write_table(
        "GPUs", ["", "name", "capability", "memory"], gpus or [["-", "none", "", ""]], left=2
    )
    packages = [
        [p["name"], p["version"] or "not installed", p["use"]] for p in facts["optional_packages"]
    ]
    common.write_table("Optional packages", ["package", "version", "for"], packages, left=3)
    known = [[f["name"], f["summary"]] for f in facts["formats"]]
    common.write_table("Formats", ["format", ""], known, left=2)
    kernels = [
        [
            k["name"],
            k["backend"],
            "usable" if k["unavailable"] is None else f"not usable: {k['unavailable']}",
        ]
        for k in facts["kernels"]
    ]
    common.write_table("Kernels", ["kernel", "backend", "here"], kernels, left=3)


def _write_matrix(markdown: bool, json: bool) -> None:
    from . import matrix

    if json:
        common.write_json(matrix.rows())
    elif markdown:
        print(common.markdown_table(matrix.COLUMNS, matrix.text_rows(), left=len(matrix.COLUMNS)))
    else:
        common.write_table(
            "What each format supports, with its default parameters", matrix.COLUMNS,
            matrix.text_rows(), left=len(matrix.COLUMNS),
        )  # fmt: skip


def collect() -> dict:  # type: ignore[type-arg]
    """All of it as one JSON-serializable dict."""
    import platform

    import torch

    from .. import formats
    from ..backends import registry
    from ..backends.cuda import build
    from ..version import __version__

    gpus = []
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        capability = f"{device.major}.{device.minor}"
        gpus.append({"name": device.name, "capability": capability, "memory": device.total_memory})
    return {
        "versions": {
            "qkernels": __version__,
            "python": platform.python_version(),
            "os": platform.platform(),
            "torch": torch.__version__,
            "CUDA of torch": torch.version.cuda,
            "triton": _version("triton"),
            "nvcc": _nvcc(),
            "CUDA kernels": build.state(),
        },
        "gpus": gpus,
        "optional_packages": [
            {"name": name, "version": _version(name), "use": use} for name, use in _OPTIONAL.items()
        ],
        "formats": [
            {"name": name, "summary": formats.get(name).summary} for name in formats.names()
        ],
        "kernels": [
            {"name": k.name, "backend": k.backend, "unavailable": k.unavailable()}
            for k in [*registry.kernels(), *registry.experts_kernels()]
        ],
    }


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _nvcc() -> str | None:
    import os
    import re
    import shutil
    import subprocess
    from pathlib import Path

    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    found = shutil.which("nvcc") or next(
        (str(p) for home in homes if home and (p := Path(home) / "bin" / "nvcc").is_file()), None
    )
    if found is None:
        return None
    try:
        text = subprocess.run(
            [found, "--version"], capture_output=True, text=True, timeout=20
        ).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{found} does not run: {error}"
    match = re.search(r"release ([\d.]+)", text)
    return f"{match[1] if match else 'unknown version'} ({found})"
