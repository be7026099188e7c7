"""Makes triton's interpreter faster without changing what it computes."""

from __future__ import annotations

import inspect
from typing import Any

#: attribute of triton.runtime.interpreter -> triton's own, of those that `speed_up` replaces
REPLACED: dict[str, Any] = {}


def speed_up() -> None:
    """Leaves out two things that triton 3.9's interpreter does again and again, at no gain.

    The interpreter replaces the functions of `triton.language` at each launch of a kernel and puts
    them back at its end. It also replaces them at every call of a device function inside the
    kernel: a third of the time of our tests' small launches. And it builds a table of all dtypes at
    each look-up of one. kernels/test_interpreter.py compares results with and without this.
    """
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    if not hasattr(interpreter, "_LangPatchScope"):  # another triton, another interpreter
        return
    for attribute in ("_patch_lang", "_get_np_dtype"):
        REPLACED[attribute] = getattr(interpreter, attribute)
    interpreter._patch_lang = _replaced_once_a_launch(interpreter)
    interpreter._get_np_dtype = _remembered_dtypes(interpreter)


def _replaced_once_a_launch(interpreter: Any) -> Any:
    """`_patch_lang` that does nothing where the launch under way has replaced those functions."""
    real, language = interpreter._patch_lang, interpreter.tl
    replaced: set[int] = set()  # ids of language modules, from the start of a launch to its end
    modules: dict[Any, set[int]] = {}

    def language_modules(fn: Any) -> set[int]:
        if fn not in modules:
            values = [v for v in fn.__globals__.values() if inspect.ismodule(v)]
            modules[fn] = {id(v) for v in values if v in (language, language.core)}
        return modules[fn]

    class LaunchScope(interpreter._LangPatchScope):  # type: ignore[misc,name-defined]
        def restore(self) -> None:
            super().restore()
            replaced.clear()

    def patch_lang(fn: Any) -> Any:
        needed = language_modules(fn)
        if needed and needed <= replaced:
            return interpreter._LangPatchScope()
        is_launch, scope = not replaced, real(fn)
        replaced.update(needed)
        if is_launch:
            scope.__class__ = LaunchScope
        return scope

    return patch_lang


def _remembered_dtypes(interpreter: Any) -> Any:
    """`_get_np_dtype` that keeps the numpy dtype of each scalar dtype."""
    real, dtypes = interpreter._get_np_dtype, {}

    def numpy_dtype(dtype: Any) -> Any:
        if type(dtype) is not interpreter.tl.dtype:
            return real(dtype)
        if dtype.name not in dtypes:
            dtypes[dtype.name] = real(dtype)
        return dtypes[dtype.name]

    return numpy_dtype
