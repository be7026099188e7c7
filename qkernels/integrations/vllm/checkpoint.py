"""What a quantized checkpoint holds for each module, by its config and its local files."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...checkpoints.hf.layers import scheme_of
from ...checkpoints.hf.quantization import EMBEDDING, LINEAR, Plan, Scheme
from ...checkpoints.tensor_files import TensorFiles

#: the name of our quantization method in vLLM
NAME = "qkernels"
#: names of input embeddings in models; vLLM does not tell every embedding its name
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

    config: the `quantization_config`. Without local files (for a model that is still to be
    downloaded) only the config is known, and errors in the tensors show when the tensors arrive.
    """

    def __init__(self, config: Mapping[str, Any], where: str = "config.json") -> None:
        """ValueError for a config that no format reads."""
        self.plan = Plan(where, config)
        self.where = where
        self.directory: Path | None = None
        self.files: TensorFiles | None = None
        self._stored: dict[str, str] = {}  # tensor name in vLLM -> name in the files
        self._sorted: list[str] = []

    def open(self, directory: Path) -> None:
        """Read the headers of the safetensors in `directory`. ValueError if they are damaged."""
        self.files = TensorFiles(directory)
        self.directory, self.where = directory, str(directory)
        self._set_names({name: name for name in self.files.infos})

    def __getstate__(self) -> dict[str, Any]:
        """The state that vLLM sends to other processes, without rules and open files."""
        return {
            "config": self.plan.config,
            "where": self.where,
            "directory": self.directory,
            "full": self._stored,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["config"], state["where"])  # type: ignore[misc]
        if state["directory"] is not None:
            self.open(state["directory"])
            self._set_names(state["full"])

    def rename(self, rule: Callable[[str], str | None]) -> None:
        """Apply vLLM's renaming of tensors: `rule` returns the new name, None to drop one."""
        renamed = {rule(name): stored for name, stored in self._stored.items()}
        self._set_names({name: stored for name, stored in renamed.items() if name is not None})

    def _set_names(self, stored: dict[str, str]) -> None:
        """Set the tensor names: name in vLLM -> name in the files."""
        self._stored, self._sorted = stored, sorted(stored)

    def names(self, module: str) -> dict[str, str]:
        """Tensor name within the module -> name in the files; empty without tensors or files."""
        names: dict[str, str] = {}
        begin = bisect_left(self._sorted, f"{module}.")
        for name in self._sorted[begin:]:
            if not name.startswith(f"{module}."):
                break
            if name.rpartition(".")[2] not in _CACHE:
                names[name[len(module) + 1 :]] = self._stored[name]
        return names

    def scheme(self, module: str) -> Scheme | None:
        """Format and parameters of a module's weight; None if it is unquantized.

        As in `qkernels.load_model`, the tensors decide where they are known. Raises ValueError if
        they are packed and the config says that they are not.
        """
        names = self.names(module)
        kinds = EMBEDDING if module.rpartition(".")[2] in _EMBEDDINGS else LINEAR
        if self.files is None:
            return self.plan.scheme(module, kinds)
        return scheme_of(names, self.files, self.plan, kinds) if names else None

    def tensors(self, module: str) -> dict[str, Tensor] | None:
        """The module's tensors without the bias, mapped and not read; None without files."""
        if self.files is None:
            return None
        return {
            leaf: self.files.read(stored)
            for leaf, stored in self.names(module).items()
            if leaf != "bias"
        }

    def has(self, module: str) -> bool:
        """Whether the files hold tensors of the module."""
        return bool(self.names(module))

    def packed_below(self, module: str) -> str | None:
        """Name of a packed tensor in `module` or inside it; None without one or without files."""
        begin = bisect_left(self._sorted, f"{module}.")
        for name in self._sorted[begin:]:
            if not name.startswith(f"{module}."):
                break
            if name.rpartition(".")[2] not in ("weight", "bias", *_CACHE):
                return name
        return None

    def embedding(self) -> str | None:
        """Name of the packed input embedding; None if there is none."""
        modules = {
            name[: name.find(f".{leaf}.") + len(leaf) + 1]
            for name in self._sorted
            for leaf in _EMBEDDINGS
            if f".{leaf}." in name
        }
        return next((name for name in sorted(modules) if self.scheme(name) is not None), None)
