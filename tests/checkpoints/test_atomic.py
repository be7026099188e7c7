"""A saved file appears whole or not at all: faults at every step, signals, races, planted links."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from qkernels.checkpoints import atomic

from .. import faults
from ..faults import Directory, File, left_beside

#: a process that saves over and over; it loads atomic.py by itself, because torch takes seconds to
#: import
SAVER = textwrap.dedent(
    """
    import importlib.util, signal, sys
    from pathlib import Path
    spec = importlib.util.spec_from_file_location("atomic", sys.argv[1])
    atomic = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(atomic)
    if sys.argv[5] == "plain":
        atomic._renameat2 = lambda: None
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored
    print("ready", flush=True)
    for i in range(int(sys.argv[4])):
        with atomic.replacing(Path(sys.argv[2])) as fresh:
            fresh.mkdir()
            for name in ("config.json", "model.safetensors"):
                (fresh / name).write_text(sys.argv[3])
    """
)


def start_saving(
    path: Path, content: str, count: int, how: str = "exchange"
) -> subprocess.Popen[str]:
    """Start a process that saves `count` times. Returns once it has begun."""
    arguments = [atomic.__file__, str(path), content, str(count), how]
    process = subprocess.Popen(
        [sys.executable, "-c", SAVER, *arguments], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def can_exchange(folder: Path) -> bool:
    for name in ("a", "b"):
        (folder / name).mkdir()
    able = atomic._exchange(folder / "a", folder / "b")
    for name in ("a", "b"):
        (folder / name).rmdir()
    return able


@pytest.mark.parametrize(("kind", "fault", "over", "exchange"), list(faults.cases()))
def test_a_fault_at_any_step_leaves_the_old_or_the_new(
    kind: Any, fault: str, over: bool, exchange: bool
) -> None:
    steps, at_once, after = faults.run(kind, fault, over=over, exchange=exchange)
    assert steps > 20
    before = faults.OLD if over else None
    assert set(after) == {before, faults.NEW}
    if fault == "killed at each line" and not exchange:
        assert at_once[None] <= 1  # between two renames; the next save moves the old one back
    else:
        assert at_once == after


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("how", ["exchange", "plain"])
def test_signals_from_outside(tmp_path: Path, number: signal.Signals, how: str) -> None:
    path = tmp_path / "model"
    for i in range(8):
        Directory.write(path, faults.OLD)
        process = start_saving(path, faults.NEW, 10**6, how)
        time.sleep(0.005 * i)
        process.send_signal(number)
        process.wait(timeout=30)
        # whose traceback Python prints, and ends with 130 or by the signal
        if number != signal.SIGINT:
            assert process.returncode == -number
        if number == signal.SIGKILL:
            atomic._clean(tmp_path)
        assert Directory.read(path) in (faults.OLD, faults.NEW)
    Directory.write(path, faults.NEW)
    assert left_beside(path) == []


def test_sigterm_does_not_wait_for_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save() -> None:
        with atomic.replacing(tmp_path / "model") as fresh:
            fresh.write_text(faults.NEW)
            signal.raise_signal(signal.SIGTERM)

    File.write(tmp_path / "model", faults.OLD)
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda *what: sent.append(what))
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(atomic._Terminated):
            save()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert sent == [(os.getpid(), signal.SIGTERM)]
    assert (tmp_path / "model").read_text() == faults.OLD
    assert left_beside(tmp_path / "model") == []


def test_two_processes_save_to_one_place(tmp_path: Path) -> None:
    """Both succeed, and a reader always sees one of the two files as a whole."""
    path = tmp_path / "model"
    able = can_exchange(tmp_path)
    Directory.write(path, "a")
    savers = [start_saving(path, content, 100) for content in "ab"]
    seen = 0
    while any(process.poll() is None for process in savers):
        handle = None
        try:
            handle = os.open(path, os.O_RDONLY)  # a directory stays the one it is while it is open
            names = set(os.listdir(handle))
        except FileNotFoundError:
            assert not able, "there was nothing under the name"
            continue
        finally:
            if handle is not None:
                os.close(handle)
        # One that was replaced after it was opened may be in the middle of its removal.
        seen += names == {"config.json", "model.safetensors"}
    assert [process.wait() for process in savers] == [0, 0]
    assert seen > 0
    assert Directory.read(path) in ("a", "b")
    assert left_beside(path) == []


@pytest.mark.parametrize("name", ["rename", "_exchange"])
def test_another_process_gets_in_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A directory appears or vanishes between our look and our action."""
    path, module = tmp_path / "model", os if name == "rename" else atomic
    if name == "_exchange":
        Directory.write(path, faults.OLD)
    real = getattr(module, name)
    calls = []

    def late(one: Path, other: Path) -> Any:
        calls.append(other)
        if len(calls) == 1:
            shutil.rmtree(path) if path.exists() else shutil.copytree(one, path)
        return real(one, other)

    monkeypatch.setattr(module, name, late)
    Directory.write(path, faults.NEW)
    assert Directory.read(path) == faults.NEW
    assert calls != []
    assert left_beside(path) == []


def test_sigterm_handlers_of_the_program_are_left_alone(tmp_path: Path) -> None:
    def handler(*_: object) -> None:
        raise AssertionError

    before = signal.signal(signal.SIGTERM, handler)
    try:
        with atomic.replacing(tmp_path / "model") as fresh:
            assert signal.getsignal(signal.SIGTERM) is handler
            fresh.write_text("")
        assert signal.getsignal(signal.SIGTERM) is handler
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with atomic.replacing(tmp_path / "model") as fresh:
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
            fresh.write_text("")
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("exchange", [True, False])
def test_bytes_are_on_the_disk_before_their_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    """After a power cut, no name may stand for a file whose bytes had not been written."""
    events: list[int | str] = []

    def told(function: Any, event: Any) -> Any:
        def call(*args: Any) -> Any:
            events.append(event(*args))
            return function(*args)

        return call

    with faults.exchanging(exchange):
        Directory.write(tmp_path / "model", faults.OLD)
        monkeypatch.setattr(os, "fsync", told(os.fsync, lambda handle: os.fstat(handle).st_ino))
        monkeypatch.setattr(os, "rename", told(os.rename, lambda *_: "name"))
        monkeypatch.setattr(atomic, "_exchange", told(atomic._exchange, lambda *_: "name"))
        Directory.write(tmp_path / "model", faults.NEW)
    new = [tmp_path / "model", *(tmp_path / "model").iterdir()]
    first = events.index("name")
    assert sorted(str(e) for e in events[:first]) == sorted(str(path.stat().st_ino) for path in new)
    assert events[-1] == tmp_path.stat().st_ino
    assert events.count("name") == (1 if exchange and can_exchange(tmp_path) else 3)


def test_a_save_under_way_is_not_cleaned_up(tmp_path: Path) -> None:
    with atomic.replacing(tmp_path / "one") as fresh:
        fresh.write_text("1")
        File.write(tmp_path / "other", "2")
        assert fresh.read_text() == "1"
    assert (tmp_path / "one").read_text() == "1"
    assert left_beside(tmp_path / "one") == [tmp_path / "other"]


def test_nothing_but_our_own_private_folders_is_cleaned_up(tmp_path: Path) -> None:
    """Links, files, folders without a lock, and folders that a process is about to lock stay."""
    precious = tmp_path / "elsewhere" / "precious"
    precious.mkdir(parents=True)
    (precious / "lock").write_text(f"{atomic.socket.gethostname()} 1\n")
    (precious / "data").write_text("text")
    (tmp_path / f"{atomic.PREFIX}link").symlink_to(precious, target_is_directory=True)
    (tmp_path / f"{atomic.PREFIX}file").write_text("text")
    (tmp_path / f"{atomic.PREFIX}folder").mkdir()
    (tmp_path / f"{atomic.PREFIX}folder" / "data").write_text("text")
    (tmp_path / f"{atomic.PREFIX}begun").mkdir()
    (tmp_path / f"{atomic.PREFIX}begun" / "lock").touch()
    before = sorted(tmp_path.rglob("*"))
    File.write(tmp_path / "model", "new")
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "model"])


def test_nobody_can_plant_a_link_in_what_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even with a guessed name the folder must be new, and only its owner can enter it."""
    victim = tmp_path / "victim"
    victim.mkdir()
    monkeypatch.setattr(atomic.secrets, "token_hex", lambda count: "guessed")
    (tmp_path / f"{atomic.PREFIX}guessed").symlink_to(victim, target_is_directory=True)
    with pytest.raises(FileExistsError):
        File.write(tmp_path / "model", "new")
    assert list(victim.iterdir()) == []
    monkeypatch.undo()
    with atomic.replacing(tmp_path / "model") as fresh:
        assert fresh.parent.stat().st_mode & 0o777 == 0o700
        fresh.write_text("new")


def left_by(folder: Path, host: str) -> Path:
    """The folder of a process killed between its two renames, on a machine that sees no lock."""
    private = folder / f"{atomic.PREFIX}{host}"
    (private / "old-0").mkdir(parents=True)
    Directory.write(private / "old-0" / "model", faults.OLD)
    (private / "lock").write_text(f"{host} 1\n")
    return private


def test_what_another_machine_writes_is_not_removed(tmp_path: Path) -> None:
    """Many file systems hold locks for one machine only, so another machine's lock seems free."""
    theirs = left_by(tmp_path, "elsewhere")
    (theirs / "new").write_text("half of it")
    File.write(tmp_path / "other", faults.NEW)
    assert (theirs / "new").read_text() == "half of it"
    assert Directory.read(tmp_path / "model") == faults.OLD  # in the empty place
    os.utime(theirs, (0, 0))
    File.write(tmp_path / "other", faults.NEW)
    assert not theirs.exists()


def test_without_locks_the_old_one_is_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private = left_by(tmp_path, atomic.socket.gethostname())
    monkeypatch.setattr(atomic, "fcntl", None)
    File.write(tmp_path / "other", faults.NEW)
    assert Directory.read(tmp_path / "model") == faults.OLD
    assert private.exists()
    monkeypatch.undo()
    File.write(tmp_path / "other", faults.NEW)
    assert not private.exists()


def test_a_forked_process_leaves_it_to_its_parent(tmp_path: Path) -> None:
    with atomic.replacing(tmp_path / "model") as fresh:
        fresh.write_text(faults.NEW)
        child = os.fork()
        if child == 0:
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                signal.pause()
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    assert (tmp_path / "model").read_text() == faults.NEW


def test_a_forked_process_that_ends_the_block_leaves_it_too(tmp_path: Path) -> None:
    saving = atomic.replacing(tmp_path / "model")
    fresh = saving.__enter__()
    child = os.fork()
    if child == 0:
        try:
            saving.__exit__(SystemExit, SystemExit(), None)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    fresh.write_text(faults.NEW)
    saving.__exit__(None, None, None)
    assert (tmp_path / "model").read_text() == faults.NEW


def test_a_handler_set_in_c_is_left_alone(tmp_path: Path) -> None:
    """Python does not know of handlers set by faulthandler or torch's data loaders."""
    code = (
        "import faulthandler, os, signal, sys; from pathlib import Path; from qkernels.checkpoints "
        "import atomic\nfaulthandler.register(signal.SIGTERM)\nwith "
        "atomic.replacing(Path(sys.argv[1])) as fresh: "
        "fresh.write_text('new')\nos.kill(os.getpid(), signal.SIGTERM); print('alive')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "alive\n", done.stderr


def test_what_is_saved_is_saved_although_its_folder_cannot_be_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = atomic._sync_one

    def refused(path: Path) -> None:
        if path == tmp_path:
            raise PermissionError(13, "Permission denied")
        real(path)

    monkeypatch.setattr(atomic, "_sync_one", refused)
    File.write(tmp_path / "model", faults.NEW)
    assert (tmp_path / "model").read_text() == faults.NEW


def test_directories_are_not_replaced_by_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a file or nothing to save to, got a directory"):
        File.write(tmp_path, "new")


def test_names_as_long_as_they_can_be(tmp_path: Path) -> None:
    File.write(tmp_path / ("a" * 255), "new")
    Directory.write(tmp_path / ("b" * 255), "new")
    assert {len(entry.name) for entry in tmp_path.iterdir()} == {255}
