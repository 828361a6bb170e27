"""Every write is whole or did not happen, whatever fails and whenever."""

import ctypes
import errno
import io
import os
import re
import resource
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError

import tether
from tether import Adapter, Factors, LayerAdapter, Layout, Provenance, fs
from tether.errors import WriteError
from tether.formats import native
from tether.stream import TensorWriter

FILES = {"one", "two"}


def adapter(version: int, rank: int = 1) -> Adapter:
    """Recognised by its one value."""
    factors = Factors(torch.full((rank, 2), 1.0), torch.full((3, rank), float(version)))
    layer = LayerAdapter(factors, None, 1.0, Layout("linear", (3, 2)))
    return Adapter({"m": layer}, Provenance("lora"))


def write_file(target: Path, version: int) -> None:
    with fs.atomic_file(target) as temporary:
        temporary.write_text(f"{version}")


def write_folder(target: Path, version: int) -> None:
    with fs.atomic_directory(target, FILES) as temporary:
        for name in FILES:
            (temporary / name).write_text(f"{version}")


def read_folder(target: Path) -> float:
    one, two = ((target / name).read_text() for name in sorted(FILES))
    assert one == two
    return float(one)


def read_adapter(target: Path) -> float:
    layer = tether.load(target).layers["m"]
    a, b = layer.trainable.A, layer.trainable.B
    return float((b @ a)[0, 0]) * layer.scaling


@dataclass(frozen=True)
class Way:
    """A way of writing, and of reading back which version it was."""

    write: Callable[[Path, int], object]
    read: Callable[[Path], float]


WAYS = {
    "atomic_file": Way(write_file, lambda target: float(target.read_text())),
    "atomic_directory": Way(write_folder, read_folder),
    "save": Way(lambda target, version: tether.save(adapter(version), target), read_adapter),
    "save_as_lora": Way(
        lambda target, version: tether.save_as_lora(adapter(version), target), read_adapter
    ),
}
FOLDERS = {name: WAYS[name] for name in ("atomic_directory", "save_as_lora")}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
every_folder = pytest.mark.parametrize("way", FOLDERS.values(), ids=FOLDERS)


def version_at(way: Way, target: Path) -> float | None:
    """Which version stands there, whole; None for nothing."""
    return way.read(target) if os.path.lexists(target) else None


def others(target: Path) -> list[str]:
    """What lies beside the target."""
    return sorted(path.name for path in target.parent.iterdir() if path.name != target.name)


@dataclass
class Calls:
    """The operating system's calls, counted; one of them may fail."""

    fail_at: int = 0
    error: BaseException = field(default_factory=KeyboardInterrupt)
    after: bool = False  # the call is done before the error is raised
    watch: Callable[[], None] = lambda: None
    names: list[str] = field(default_factory=list)
    cleaning: bool = False
    failed_in_cleaning: bool = False
    busy: bool = False

    def counted(self, name: str, function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            # shutil closes twice where a close fails.
            if self.busy or (self.cleaning and name == "close"):
                return function(*args, **kwargs)
            self.look()
            self.names.append(name)
            fails = len(self.names) == self.fail_at
            if fails:
                self.failed_in_cleaning = self.cleaning or name == "unlink"
            # A failing close closes all the same.
            if fails and not (self.after or name == "close"):
                raise self.error
            result = None
            try:
                result = function(*args, **kwargs)
                self.look()
            finally:
                if fails:
                    getattr(result, "close", lambda: None)()
                    raise self.error
            return result

        return call

    def look(self) -> None:
        self.busy = True
        self.watch()
        self.busy = False

    def clean(self, *args: object, **kwargs: object) -> None:
        self.cleaning = True
        shutil_rmtree(*args, **kwargs)
        self.cleaning = False


shutil_rmtree = shutil.rmtree
OF_OS = ("open", "close", "rename", "replace", "chmod", "mkdir", "unlink", "rmdir")


@contextmanager
def calls(exchange: bool = True, **settings: object) -> Iterator[Calls]:
    """Count the calls within the block."""
    made = Calls(**settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "rmtree", made.clean)
        for name in (*OF_OS, "listdir", "scandir"):
            patch.setattr(os, name, made.counted(name, getattr(os, name)))
        patch.setattr(os, "fsync", made.counted("fsync", lambda handle: None))
        patch.setattr(io, "open", made.counted("io.open", io.open))
        patch.setattr(native, "save_file", made.counted("save_file", native.save_file))
        for name in ("write", "finish"):
            patch.setattr(TensorWriter, name, made.counted(name, getattr(TensorWriter, name)))
        if exchange:
            patch.setattr(fs, "_exchange", made.counted("exchange", fs._exchange))
        else:
            patch.setattr(fs, "_exchange", lambda *_: False)
        yield made


def situations(folder: Path) -> Iterator[tuple[Path, float | None, bool]]:
    """(target, version there, whether the system can exchange two names) in fresh folders."""
    for version, exchange in ((None, True), (1, True), (1, False)):
        name = f"{'no ' if not exchange else ''}exchange over {version}"
        (folder / name).mkdir()
        yield folder / name / "target", version, exchange


ERRORS = {
    "full disk": lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "interrupt": KeyboardInterrupt,
}


@every_way
@pytest.mark.parametrize("after", [False, True], ids=["instead", "after"])
@pytest.mark.parametrize("kind", ERRORS)
def test_a_failure_at_any_call_leaves_the_old_or_the_new(tmp_path, way, kind, after):
    def attempt(target: Path, old: int | None, **settings: object) -> BaseException | None:
        shutil.rmtree(target.parent)
        target.parent.mkdir()
        if old:
            way.write(target, old)
        with calls(**settings) as made:
            try:
                way.write(target, 2)
            except BaseException as error:  # noqa: BLE001
                return made, error
        return made, None

    for target, old, exchange in situations(tmp_path):
        made, error = attempt(target, old, exchange=exchange)
        assert error is None
        for number, name in enumerate(made.names, start=1):
            what = f"{name}, call {number} of {made.names}, over {old}"
            failing, error = attempt(
                target, old, exchange=exchange, fail_at=number, error=ERRORS[kind](), after=after
            )
            assert len(failing.names) >= number, what
            assert version_at(way, target) in ({2} if error is None else {old, 2}), what
            if kind == "interrupt":
                assert isinstance(error, KeyboardInterrupt), what
            elif error is not None:
                assert isinstance(error, WriteError), what
                assert f"{target}: cannot be written: No space left on device. Free" in str(error)
            # What was interrupted while being made has no name yet to remove it by.
            if not failing.failed_in_cleaning and not after:
                assert others(target) == [], what


@every_way
def test_a_crash_between_any_two_calls_leaves_the_old_or_the_new(tmp_path, way):
    for target, old, exchange in situations(tmp_path):
        if old:
            way.write(target, old)
        seen = [old]

        def look(target: Path = target, seen: list = seen) -> None:
            version = version_at(way, target)
            if version != seen[-1]:
                seen.append(version)

        with calls(exchange, watch=look) as made:
            way.write(target, 2)
        assert len(made.names) > 5
        # Without an exchange a folder is missing for a moment, with both whole beside it.
        gap = not exchange and way in FOLDERS.values()
        assert seen == ([old, None, 2] if gap else [old, 2])


@every_way
def test_an_error_of_the_caller_s_own_is_kept_and_nothing_written(tmp_path, way, monkeypatch):
    target = tmp_path / "target"
    way.write(target, 1)

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(io, "open", broken)
    monkeypatch.setattr(native, "save_file", broken)
    monkeypatch.setattr(TensorWriter, "write", broken)
    with pytest.raises(ZeroDivisionError):
        way.write(target, 2)
    monkeypatch.undo()
    assert version_at(way, target) == 1
    assert others(target) == []


def test_safetensors_own_error_is_a_write_error(tmp_path, monkeypatch):
    def half_written(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    target, way = tmp_path / "target", WAYS["save"]
    way.write(target, 1)
    monkeypatch.setattr(native, "save_file", half_written)
    with pytest.raises(WriteError, match=r"target: cannot be written: .*No space.*Free some"):
        way.write(target, 2)
    assert version_at(way, target) == 1
    assert others(target) == []


@pytest.mark.parametrize("name", ["save", "save_as_lora"])
def test_the_system_s_own_limit_on_file_sizes_is_a_write_error(tmp_path, name):
    target = tmp_path / "target"
    write = {"save": tether.save, "save_as_lora": tether.save_as_lora}[name]
    write(adapter(1), target)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 100, 700, 4096, 30_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(WriteError, match=r"target: cannot be written"):
                write(adapter(2, rank=2000), target)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert read_adapter(target) == 1
        assert others(target) == []


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "Free some space"),
        (errno.EDQUOT, "Free some of your quota"),
        (errno.EFBIG, "write elsewhere"),
        (errno.EROFS, "permissions"),
        (errno.EACCES, "permissions"),
        (errno.EIO, "Check the path"),
    ],
    ids=lambda value: errno.errorcode.get(value, ""),
)
@every_way
def test_an_error_says_why_and_what_to_do(tmp_path, way, number, advice):
    error = OSError(number, os.strerror(number))
    with calls() as made:
        way.write(tmp_path / "target", 1)
    at = 1 + made.names.index("fsync")
    with calls(fail_at=at, error=error), pytest.raises(WriteError) as caught:
        way.write(tmp_path / "target", 2)
    assert caught.value.__cause__ is error
    for word in (str(tmp_path / "target"), os.strerror(number), advice):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "library", [SimpleNamespace(), SimpleNamespace(renameat2=lambda *_: -1)], ids=["none", "fails"]
)
@every_folder
def test_a_system_that_cannot_exchange_two_names(tmp_path, way, library, monkeypatch):
    target = tmp_path / "target"
    way.write(target, 1)
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: library)
    way.write(target, 2)
    assert version_at(way, target) == 2
    assert others(target) == []


def test_linux_exchanges_two_names_in_one_step(tmp_path):
    for name in FILES:
        (tmp_path / name).mkdir()
    (tmp_path / "one" / "x").touch()
    assert fs._exchange(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "two" / "x").exists()
    assert not fs._exchange(tmp_path / "one", tmp_path / "three")


def test_a_folder_that_cannot_be_synced_is_no_error(tmp_path, monkeypatch):
    fsync = os.fsync

    def refuse(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "no")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", refuse)
    for name, way in WAYS.items():
        way.write(tmp_path / name, 2)
        assert version_at(way, tmp_path / name) == 2


@every_way
def test_what_was_written_is_synced_before_the_swap_and_the_folder_after(
    tmp_path, way, monkeypatch
):
    target, log = tmp_path / "target", []
    way.write(target, 1)

    def logged(function: Callable[..., object]) -> Callable[..., object]:
        return lambda *args: (log.append("swap"), function(*args))[1]

    monkeypatch.setattr(os, "fsync", lambda handle: log.append(os.fstat(handle).st_ino))
    monkeypatch.setattr(os, "replace", logged(os.replace))
    monkeypatch.setattr(fs, "_exchange", logged(fs._exchange))
    way.write(target, 2)
    swap = log.index("swap")
    assert set(log[:swap]) == {path.stat().st_ino for path in (target, *target.rglob("*"))}
    assert log[swap + 1 :] == [tmp_path.stat().st_ino]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
@every_way
def test_permissions_are_those_of_any_new_file(tmp_path, way, umask):
    before = os.umask(umask)
    try:
        way.write(tmp_path / "new" / "target", 2)
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    for path in (tmp_path / "new").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask


@every_way
def test_parent_folders_are_made(tmp_path, way):
    way.write(tmp_path / "a" / "b" / "target", 2)
    assert version_at(way, tmp_path / "a" / "b" / "target") == 2


@pytest.mark.parametrize("given", ["target", "./target", "a/../target", "target/", "a//./b/target"])
@every_way
def test_relative_paths_and_slashes(tmp_path, way, given, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    for version in (1, 2):
        way.write(given, version)
        target = tmp_path / given
        assert version_at(way, target.resolve()) == version
        assert {path.name for path in tmp_path.iterdir()} <= {"a", "target"}


@every_folder
def test_the_current_folder_is_replaced_or_left_alone(tmp_path, way, monkeypatch):
    (tmp_path / "target").mkdir()
    monkeypatch.chdir(tmp_path / "target")
    try:
        way.write(".", 2)
    except WriteError:
        assert list((tmp_path / "target").iterdir()) == []
    else:
        assert version_at(way, tmp_path / "target") == 2
    assert others(tmp_path / "target") == []


@every_way
def test_a_path_that_no_system_allows(tmp_path, way):
    for name in ("a\0b", "x" * 300):
        with pytest.raises(WriteError, match="cannot be written"):
            way.write(tmp_path / name, 2)
    assert list(tmp_path.iterdir()) == []


@every_way
def test_a_file_in_the_place_of_a_parent(tmp_path, way):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(WriteError, match="file"):
        way.write(tmp_path / "file" / "target", 2)
    assert (tmp_path / "file").read_text() == "mine"


@every_way
def test_a_folder_for_a_file_and_a_file_for_a_folder(tmp_path, way):
    target, folder = tmp_path / "target", way in FOLDERS.values()
    if folder:
        target.write_text("mine")
    else:
        target.mkdir()
    expected = "is a file; give the name of a folder" if folder else "is a folder; give the name"
    with pytest.raises(WriteError, match=f"^{re.escape(str(target))}: {expected}"):
        way.write(target, 2)
    assert target.read_text() == "mine" if folder else target.is_dir()
    assert others(target) == []


@pytest.mark.parametrize("over", ["nothing", "old"])
@pytest.mark.parametrize(
    "foreign", [["notes.txt"], [".git"], ["a", "b", "c"], ["one.txt"], ["checkpoint-1/x"]], ids=str
)
@every_folder
def test_a_folder_with_other_files_is_left_as_it_is(tmp_path, way, over, foreign):
    target = tmp_path / "target"
    if over == "old":
        way.write(target, 1)
    for name in foreign:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text("mine")
    before = sorted(target.rglob("*"))
    with pytest.raises(WriteError, match="Choose another folder") as caught:
        way.write(target, 2)
    first = repr(sorted(foreign)[0].split("/")[0])
    more = f"{first} and {len(foreign) - 1} more files" if len(foreign) > 1 else first
    assert f"{target}: holds {more}" in str(caught.value)
    assert sorted(target.rglob("*")) == before
    assert all((target / name).read_text() == "mine" for name in foreign)
    assert others(target) == []


def test_a_folder_in_the_place_of_one_of_the_files_is_not_lost(tmp_path):
    inner = tmp_path / "target" / "one"
    inner.mkdir(parents=True)
    (inner / "notes.txt").write_text("mine")
    with pytest.raises(WriteError, match="'one'"):
        write_folder(tmp_path / "target", 2)
    assert (inner / "notes.txt").read_text() == "mine"


@every_folder
def test_an_empty_folder_is_filled(tmp_path, way):
    (tmp_path / "target").mkdir()
    way.write(tmp_path / "target", 2)
    assert version_at(way, tmp_path / "target") == 2
    assert others(tmp_path / "target") == []


@every_way
def test_a_link_keeps_what_it_points_at_whole(tmp_path, way):
    way.write(tmp_path / "real", 1)
    (tmp_path / "target").symlink_to("real")
    way.write(tmp_path / "target", 2)
    assert version_at(way, tmp_path / "target") == 2
    assert version_at(way, tmp_path / "real") in (1, 2)
    assert others(tmp_path / "target") == ["real"]


def test_write_text(tmp_path):
    fs.write_text(tmp_path / "a" / "text", "é😀\n")
    assert (tmp_path / "a" / "text").read_bytes() == "é😀\n".encode()


def test_append_line(tmp_path):
    for line in ("one", "é"):
        fs.append_line(tmp_path / "log", line)
    assert (tmp_path / "log").read_bytes() == "one\né\n".encode()
    with pytest.raises(WriteError, match=r"none/log: cannot be written: No such file"):
        fs.append_line(tmp_path / "none" / "log", "one")


def test_make_directory(tmp_path):
    for _ in range(2):
        fs.make_directory(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="file: cannot be written"):
        fs.make_directory(tmp_path / "file")
