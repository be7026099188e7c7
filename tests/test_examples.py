"""The commands that the examples start."""

from __future__ import annotations

import importlib.util
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_server_listens_on_this_machine_alone() -> None:
    """Unless the user's own options, which come last, say otherwise."""
    spec = importlib.util.spec_from_file_location("serve", EXAMPLES / "serve.py")
    assert spec is not None
    assert spec.loader is not None
    serve = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(serve)
    words = serve.command(Path("model"), 8000, ["--host", "0.0.0.0"])
    assert words[words.index("--host") + 1] == "127.0.0.1"
    assert words[-2:] == ["--host", "0.0.0.0"]
