"""Archives from elsewhere are unpacked into their folder and nowhere else, and only so much of them."""

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from earl.data import archives
from earl.messages.errors import EarlError

Change = Callable[[tarfile.TarInfo], None]


def member(name: str, kind: bytes = tarfile.REGTYPE, to: str = "", size: int = 0, mode: int = 0o644) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname, made.size, made.mode = kind, to, size, mode
    return made


def archive(path: Path, *members: tarfile.TarInfo | str) -> Path:
    """Write an archive; a text is the name of a file that holds its own name."""
    mode = "w:gz" if path.name.endswith("gz") else "w"
    with tarfile.open(path, mode) as tar:
        for one in members:
            if isinstance(one, str):
                tar.addfile(member(one, size=len(one)), io.BytesIO(one.encode()))
            else:
                tar.addfile(one, io.BytesIO(b"x" * one.size))
    return path


def files(folder: Path) -> dict[str, str]:
    found = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {path.relative_to(folder).as_posix(): path.read_text() for path in found}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where to unpack; nothing beside it may change."""
    (tmp_path / "secret").write_text("mine")
    return tmp_path / "out"


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar"])
def test_files_and_folders_come_out(name: str, place: Path, tmp_path: Path) -> None:
    path = archive(tmp_path / name, member("a", tarfile.DIRTYPE), "a/1.pth", "./a/b/2.pth", "3.pth")
    archives.unpack(path, place)
    assert files(place) == {"a/1.pth": "a/1.pth", "a/b/2.pth": "./a/b/2.pth", "3.pth": "3.pth"}


def test_permissions_are_those_of_a_new_file(place: Path, tmp_path: Path) -> None:
    archives.unpack(archive(tmp_path / "a.tar", member("a", mode=0o4777), member("d", tarfile.DIRTYPE, mode=0)), place)
    (tmp_path / "new").touch()
    assert (place / "a").stat().st_mode == (tmp_path / "new").stat().st_mode
    assert os.access(place / "d", os.W_OK | os.X_OK)


def test_links_inside_are_kept(place: Path, tmp_path: Path) -> None:
    links = (member("d/feature/list", tarfile.SYMTYPE, "../list"), member("d/same.pth", tarfile.LNKTYPE, "d/list/a"))
    archives.unpack(archive(tmp_path / "a.tar.gz", *links, "d/list/a"), place)
    assert (place / "d" / "feature" / "list" / "a").read_text() == "d/list/a"
    assert (place / "d" / "same.pth").read_text() == "d/list/a"


BAD = {
    "an absolute name": [member("/tmp/earl-was-here")],
    "a name that leads out": ["a/../../escaped"],
    "dots at the end": [member("a/..", tarfile.DIRTYPE)],
    "a link out": [member("l", tarfile.SYMTYPE, "../secret")],
    "an absolute link": [member("l", tarfile.SYMTYPE, "/etc/passwd")],
    "a hard link out": [member("l", tarfile.LNKTYPE, "../secret")],
    "a hard link to nothing": [member("l", tarfile.LNKTYPE, "none")],
    "a way out in two steps": [
        member("d", tarfile.DIRTYPE), member("d/up", tarfile.SYMTYPE, ".."), member("out", tarfile.SYMTYPE, "d/up/..")
    ],
    "a file through a link": [member("l", tarfile.SYMTYPE, "d"), "d/a", "l/escaped"],
    "a link in the place of a file": ["a", member("a", tarfile.SYMTYPE, "b")],
    "a device": [member("null", tarfile.CHRTYPE)],
    "a block device": [member("disk", tarfile.BLKTYPE)],
    "a pipe": [member("pipe", tarfile.FIFOTYPE)],
    "one name twice": ["a", "a"],
    "a file in the place of a folder": ["a/b", "a"],
    "a name with a null byte": [member("a\0b", tarfile.DIRTYPE), member("ok"), member("x/\0/../..", tarfile.DIRTYPE)],
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused(name: str, place: Path, tmp_path: Path) -> None:
    path = archive(tmp_path / "bad.tar.gz", "before", *BAD[name])
    before = {one.name for one in tmp_path.iterdir()}
    if name == "a name with a null byte":  # tarfile itself cuts names there
        archives.unpack(path, place)
        assert {one.name for one in place.iterdir()} == {"before", "a", "ok", "x"}
        return
    with pytest.raises(EarlError, match=r"bad\.tar\.gz: .*nothing of it was kept"):
        archives.unpack(path, place)
    assert {one.name for one in tmp_path.iterdir()} == before, "neither the folder nor anything beside it"
    assert (tmp_path / "secret").read_text() == "mine"
    assert not Path("/tmp/earl-was-here").exists()


def test_a_bomb_is_stopped(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "SMALLEST_LIMIT", 10_000)
    path = archive(tmp_path / "a.tar.gz", member("zeros", size=10_000_000))
    assert path.stat().st_size * archives.LARGEST_RATIO < 10_000_000
    with pytest.raises(EarlError, match=r"a\.tar\.gz: holds more than [\d,]+ bytes"):
        archives.unpack(path, place)
    assert not place.exists()
    archives.unpack(archive(tmp_path / "b.tar.gz", *map(str, range(50))), place)


def test_names_of_any_length_are_not_read_into_memory(place: Path, tmp_path: Path) -> None:
    long = archive(tmp_path / "a.tar.gz", "a/" * 300 + "b")
    archives.unpack(long, place)
    assert list(files(place)) == ["a/" * 300 + "b"]
    with pytest.raises(EarlError, match=r"b\.tar\.gz: holds a header of [\d,]+ bytes"):
        archives.unpack(archive(tmp_path / "b.tar.gz", "b" * 2**21), place)


def test_too_many_files_are_stopped(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MOST_MEMBERS", 5)
    archives.unpack(archive(tmp_path / "a.tar", *map(str, range(5))), place)
    with pytest.raises(EarlError, match=r"b\.tar: holds more than 5 files"):
        archives.unpack(archive(tmp_path / "b.tar", *map(str, range(6))), tmp_path / "other")


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_cut_archive_is_named(keep: float, place: Path, tmp_path: Path) -> None:
    path = archive(tmp_path / "a.tar.gz", *[member(f"{i}", size=3000) for i in range(40)])
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(EarlError, match=r"a\.tar\.gz: (is damaged|is no complete archive)"):
        archives.unpack(path, place)
    assert not place.exists()


def test_what_is_no_archive(place: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.tar.gz"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    with pytest.raises(EarlError, match=r"a\.tar\.gz: is no complete archive"):
        archives.unpack(path, place)


def test_leftovers_of_a_killed_run_go(place: Path, tmp_path: Path) -> None:
    path = archive(tmp_path / "a.tar", "1")
    place.mkdir()
    (place / "old").touch()
    archives.unpack(path, place)
    assert files(place) == {"1": "1"}
