"""What a quantized checkpoint holds for each module: its config's word, and its files' where they
are local.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...checkpoints.hf.layers import scheme_of
from ...checkpoints.hf.quantization import EMBEDDING, LINEAR, Plan, Scheme
from ...checkpoints.tensor_files import TensorFiles

#: our quantization method, as vLLM knows it
NAME = "qkernels"
#: what models call their input embeddings; vLLM does not tell every embedding its name
_EMBEDDINGS = ("embed_tokens", "embed_in", "word_embeddings", "wte", "tok_embeddings", "embeddings")
#: scales of a quantized key-value cache, which vLLM handles itself
_CACHE = (
    "q_scale",
    "k_scale",
    "v_scale",
    "kv_scale",
    "q_zero_point",
    "k_zero_point",
    "v_zero_point",
)


class Checkpoint:
    """Schemes and tensors by module name.

    config: the `quantization_config`. Without files (a model still to be downloaded) only the
    config is known, and what is wrong with the tensors shows when they come.
    """

    def __init__(self, config: Mapping[str, Any], where: str = "config.json") -> None:
        """ValueError for a config that no format reads."""
        self.plan = Plan(where, config)
        self.where = where
        self.directory: Path | None = None
        self.files: TensorFiles | None = None
        self._full: dict[str, str] = {}  # tensor's name as vLLM has it -> in the files
        self._sorted: list[str] = []

    def open(self, directory: Path) -> None:
        """Read the headers of the safetensors in `directory`. ValueError if they are damaged."""
        self.files = TensorFiles(directory)
        self.directory, self.where = directory, str(directory)
        self._names({name: name for name in self.files.infos})

    def __getstate__(self) -> dict[str, Any]:
        """vLLM sends it to other processes; rules and open files stay."""
        return {
            "config": self.plan.config,
            "where": self.where,
            "directory": self.directory,
            "full": self._full,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["config"], state["where"])  # type: ignore[misc]
        if state["directory"] is not None:
            self.open(state["directory"])
            self._names(state["full"])

    def rename(self, rule: Callable[[str], str | None]) -> None:
        """Follow vLLM, which gives some models' modules other names than the checkpoint."""
        renamed = {rule(name): full for name, full in self._full.items()}
        self._names({name: full for name, full in renamed.items() if name is not None})

    def _names(self, full: dict[str, str]) -> None:
        self._full, self._sorted = full, sorted(full)

    def names(self, module: str) -> dict[str, str]:
        """{tensor's name within the module: name in the files}; empty if there are none, or no
        files.
        """
        found: dict[str, str] = {}
        begin = bisect_left(self._sorted, f"{module}.")
        for name in self._sorted[begin:]:
            if not name.startswith(f"{module}."):
                break
            if name.rpartition(".")[2] not in _CACHE:
                found[name[len(module) + 1 :]] = self._full[name]
        return found

    def scheme(self, module: str) -> Scheme | None:
        """Format and parameters of a module's weight; None if it is plain.

        As in `qkernels.load_model`, the tensors decide where they are known. ValueError if they are
        packed and the config says they are not.
        """
        names = self.names(module)
        kinds = EMBEDDING if module.rpartition(".")[2] in _EMBEDDINGS else LINEAR
        if self.files is None:
            return self.plan.scheme(module, kinds)
        return scheme_of(names, self.files, self.plan, kinds) if names else None

    def tensors(self, module: str) -> dict[str, Tensor] | None:
        """The module's tensors, mapped and not read, without the bias; None without files."""
        if self.files is None:
            return None
        return {
            own: self.files.read(full) for own, full in self.names(module).items() if own != "bias"
        }

    def has(self, module: str) -> bool:
        return bool(self.names(module))

    def packed_below(self, module: str) -> str | None:
        """Name of a packed tensor in `module` or what is inside it, None if there is none (or no
        files).
        """
        begin = bisect_left(self._sorted, f"{module}.")
        for name in self._sorted[begin:]:
            if not name.startswith(f"{module}."):
                break
            if name.rpartition(".")[2] not in ("weight", "bias", *_CACHE):
                return name
        return None

    def embedding(self) -> str | None:
        """Name of the module that is a packed input embedding, None if there is none."""
        modules = {name[: name.find(f".{leaf}.") + len(leaf) + 1] for name in self._sorted for leaf in _EMBEDDINGS
                   if f".{leaf}." in name}  # fmt: skip
        return next((name for name in sorted(modules) if self.scheme(name) is not None), None)
