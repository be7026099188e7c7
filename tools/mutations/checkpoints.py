"""Mutations of what reads and saves checkpoints."""

from __future__ import annotations

ATOMIC = "qkernels/checkpoints/atomic.py"
HF = "qkernels/checkpoints/hf/reader.py"

SAVING = [
    (ATOMIC, "        if not os.path.lexists(folder.parent / old.name):", "        if False:"),
    (ATOMIC, "                _sync(folder / _NEW)\n", ""),
    (ATOMIC, "                    _sync_one(parent)\n", "                    pass\n"),
    (ATOMIC, "            elif not _exchange(fresh, target):", "            elif True:"),
    (ATOMIC, "(errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST)", "(errno.ENOENT,)"),
    (ATOMIC, "(errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST)", "(errno.ENOTEMPTY, errno.EEXIST)"),
    (ATOMIC, "host != socket.gethostname()", "False"),
    (ATOMIC, "        return False\n    fcntl.flock", "        return True\n    fcntl.flock"),
    (ATOMIC, "                _restore(folder)\n", "                pass\n"),
    (ATOMIC, "if os.getpid() == process:", "if True:"),
    (ATOMIC, " or _handled_in_c()", ""),
    (ATOMIC, "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB if False else fcntl.LOCK_UN"),
    (ATOMIC, "if entry.name != _LOCK:", "if True:"),
    (ATOMIC, "folder.mkdir(mode=0o700)", "folder.mkdir()"),
    (ATOMIC, "folder.mkdir(mode=0o700)", "folder.mkdir(mode=0o700, exist_ok=True)"),
    (ATOMIC, "        raise _Terminated", "        return"),
    (ATOMIC, "            os.kill(os.getpid(), signal.SIGTERM)", "            pass"),
    (ATOMIC, "or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL or", "or"),
    (ATOMIC, "if stat.S_ISDIR(status.st_mode) and (", "if ("),
    ("qkernels/checkpoints/tensor_files.py", "raise OSError(f\"{path}: cannot be written: {error}\") from error", "raise"),
    ("qkernels/checkpoints/directories.py", "        yield fresh\n        check_target(target)", "        yield fresh"),
]  # fmt: skip

READERS = [
    ("qkernels/checkpoints/gguf/header.py", "tensor.offset < end:", "tensor.offset < end - 32:"),
    ("qkernels/checkpoints/gguf/header.py", "tensor.offset < end:", "tensor.offset + 1 < end:"),
    ("qkernels/checkpoints/gguf/header.py", "+ nbytes > self.size", "+ nbytes > self.size + 1"),
]  # fmt: skip

LOADED = [
    ("qkernels/formats/base.py", "1 << 20, 1 << 12", "1 << 20, 1 << 20"),
    (HF, "files.read_as(name, dtype)", "files.read(name).to(dtype or files.read(name).dtype)"),
]  # fmt: skip

OUT_OF_MEMORY = [
    ("qkernels/checkpoints/files.py", "if is_out_of_memory(error):", "if False:"),
]  # fmt: skip

#: what to break, and the tests that must notice
SUITES = (
    (SAVING, ("tests/checkpoints/test_atomic.py", "tests/checkpoints/test_saving_faults.py")),
    (READERS, ("tests/checkpoints/test_gguf_header.py",)),
    (LOADED, ("tests/checkpoints/test_load_memory.py",)),
    (OUT_OF_MEMORY, ("tests/checkpoints/test_out_of_memory.py",)),
)
