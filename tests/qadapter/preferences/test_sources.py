"""Files, folders, URLs (against a local server) and hub data sets (against one that speaks its API)."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from qadapter.errors import QAdapterError
from qadapter.preferences import download, ledger
from qadapter.preferences.download import UnreachableError
from qadapter.preferences.sources import (
    MissingPathError,
    NoDataError,
    SourceStatus,
    check,
    fingerprint,
    locate,
    unread_files,
)
from tests.support.paths import PROJECT_ROOT

ROW = b'{"chosen": "a b", "rejected": "a c"}\n'


def write(file: Path, content: bytes = ROW) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


# ------------------------------------------------------------------------------------------------ local


def test_a_file_is_itself(tmp_path: Path) -> None:
    file = write(tmp_path / "any.name")
    assert locate(str(file), cache_dir=tmp_path) == [file]
    assert locate(f"file://{file}", cache_dir=tmp_path) == [file]
    assert check(str(file)) == SourceStatus(str(file), "file", 1, len(ROW))


def test_a_folder_is_its_data_files(tmp_path: Path) -> None:
    kept = ["a.json", "b/c.jsonl.gz", "b/d.parquet", "e.jsonl", "f.arrow", "g.json.gz"]
    kept += ["h.CSV", "i.tsv.bz2", "j.jsonl.zst", "k.zip", "l.JSONL"]
    left = [
        "README.md",
        "x.py",
        "x.pkl",
        ".hidden.json",
        ".cache/y.json",
        "dataset_info.json",
        "state.json",
        "cache-1.arrow",
    ]
    for name in kept + left:
        write(tmp_path / name)
    assert locate(str(tmp_path), cache_dir=tmp_path / "cache") == [tmp_path / name for name in kept]
    assert check(str(tmp_path)) == SourceStatus(str(tmp_path), "folder", 11, 11 * len(ROW))


def test_a_folders_other_files_are_reported(tmp_path: Path) -> None:
    unread = ["Week4.XLSX", "b/week3.txt", "week3.tar.gz"]
    data = ["a.jsonl", "b/c.parquet"]
    silent = [
        *("README.md", "README", "readme.txt", "b/LICENSE", "notes.MD", "dataset_info.json", "cache-1.arrow"),
        *(".hidden.csv", ".cache/y.csv", "a.jsonl.sha256", "_SUCCESS", "Thumbs.db"),
        *("b/week5.csv.part", "week5.csv~", "week5.tmp", "week5.jsonl.crdownload"),
    ]
    for name in unread + data + silent:
        write(tmp_path / name)
    (tmp_path / "link.bin").symlink_to("/nowhere/secret.csv")
    link = {"link.bin": len("/nowhere/secret.csv")}
    assert unread_files(str(tmp_path)) == {**{name: len(ROW) for name in unread}, **link}
    assert list(unread_files(f"file://{tmp_path}")) == ["Week4.XLSX", "b/week3.txt", "link.bin", "week3.tar.gz"]
    assert locate(str(tmp_path), cache_dir=tmp_path) == [tmp_path / name for name in data]
    for no_folder in (str(tmp_path / "a.jsonl"), str(tmp_path / "nothing"), "hub:owner/name", "https://localhost/a"):
        assert unread_files(no_folder) == {}


def test_a_missing_delivery_is_no_wrong_path(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in ("empty", "missing", "missing.jsonl"):
        for options in ({}, {"split": "train"}) if path == "empty" else ({},):
            with pytest.raises(NoDataError):
                locate(str(tmp_path / path), cache_dir=tmp_path, **options)
    with pytest.raises(MissingPathError):
        locate(str(tmp_path / "missing" / "incoming"), cache_dir=tmp_path)


def test_a_hidden_parent_folder_hides_nothing(tmp_path: Path) -> None:
    file = write(tmp_path / ".data" / "a.jsonl")
    assert locate(str(file.parent), cache_dir=tmp_path) == [file]


def test_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "notes.txt")
    with pytest.raises(QAdapterError, match=r"has no data files. Files ending in \.json"):
        check(str(tmp_path))


@pytest.mark.parametrize(
    ("given", "missing", "hint"),
    [
        ("harmles.jsonl", "harmles.jsonl", "Did you mean {}/Harmless.jsonl?"),
        ("HARMLESS.jsonl", "HARMLESS.jsonl", "Did you mean {}/Harmless.jsonl?"),
        ("sets-of-dat/train.jsonl", "sets-of-dat", "Did you mean {}/sets-of-data?"),
        ("quite-different", "quite-different", "Check the path."),
        ("Harmless.jsonl/inner", "Harmless.jsonl", "Did you mean"),
    ],
)
def test_a_missing_path_names_its_neighbours(tmp_path: Path, given: str, missing: str, hint: str) -> None:
    write(tmp_path / "Harmless.jsonl")
    write(tmp_path / "sets-of-data" / "train.jsonl")
    for look in (check, lambda path: locate(path, cache_dir=tmp_path)):
        with pytest.raises(QAdapterError) as caught:
            look(str(tmp_path / given))
        assert f"there is no '{missing}' in {tmp_path}." in str(caught.value)
        assert hint.format(tmp_path) in str(caught.value)


@pytest.mark.parametrize("path", ["", "  ", "x" * 5000, "a\0b"])
def test_paths_that_no_system_has_are_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(QAdapterError):
        check(path)


def hub_folder(folder: Path, card: str = "") -> Path:
    for split in ("train", "test"):
        write(folder / "data" / f"{split}.jsonl", ROW * (2 if split == "train" else 1))
    if card:
        write(folder / "README.md", f"---\nconfigs:\n{card}---\n".encode())
    return folder


def test_splits_by_file_name(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "set")
    assert locate(str(folder), cache_dir=tmp_path, split="test") == [folder / "data" / "test.jsonl"]
    assert check(str(folder), split="train") == SourceStatus(str(folder), "folder", 1, 2 * len(ROW))
    assert len(locate(str(folder), cache_dir=tmp_path)) == 2
    with pytest.raises(QAdapterError, match=r"has no split 'dev'. Its splits are test, train"):
        locate(str(folder), cache_dir=tmp_path, split="dev")


def test_splits_and_configs_by_card(tmp_path: Path) -> None:
    card = "- config_name: one\n  data_files:\n  - split: even\n    path: data/train.jsonl\n" + (
        "- config_name: two\n  data_files:\n  - split: odd\n    path: data/te*.jsonl\n"
    )
    folder = hub_folder(tmp_path / "set", card)
    assert locate(str(folder), cache_dir=tmp_path, config_name="two") == [folder / "data" / "test.jsonl"]
    assert locate(str(folder), cache_dir=tmp_path, config_name="one", split="even") == [folder / "data" / "train.jsonl"]
    with pytest.raises(QAdapterError, match=r"available configs: \['one', 'two'\]"):
        locate(str(folder), cache_dir=tmp_path, split="even")
    with pytest.raises(QAdapterError, match=r"'three' not found. Available: \['one', 'two'\]"):
        check(str(folder), config_name="three")


@pytest.mark.parametrize("outside", ["../secret.jsonl", "{}/secret.jsonl", "data/../../secret.jsonl"])
def test_a_card_cannot_lead_out_of_its_folder(tmp_path: Path, outside: str) -> None:
    write(tmp_path / "secret.jsonl")
    card = f"- config_name: one\n  data_files:\n  - split: train\n    path: {outside.format(tmp_path)}\n"
    folder = hub_folder(tmp_path / "set", card)
    with pytest.raises(QAdapterError):
        locate(str(folder), cache_dir=tmp_path, split="train")


@pytest.mark.parametrize("pattern", ["https://localhost/a.jsonl", "hf://datasets/a/b/c.jsonl", "zip://*::a.zip"])
def test_a_card_cannot_ask_for_an_address(tmp_path: Path, pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library that would fetch it is never called."""
    monkeypatch.setattr("datasets.load_dataset_builder", None)
    folder = hub_folder(tmp_path / "set", f"- config_name: one\n  data_files:\n    train: ['{pattern}']\n")
    with pytest.raises(QAdapterError, match="names files outside the data set's folder"):
        locate(str(folder), cache_dir=tmp_path, split="train")


def test_a_card_of_aliases_is_refused(tmp_path: Path) -> None:
    """Nine levels of nine aliases are 400 million values from 500 bytes."""
    levels = "".join(f"  l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]\n" for i in range(1, 10))
    folder = hub_folder(tmp_path / "set")
    write(folder / "README.md", f"---\nbomb:\n  l0: &l0 [x]\n{levels}---\n".encode())
    with pytest.raises(QAdapterError, match="aliases expand to more than 100,000 values"):
        locate(str(folder), cache_dir=tmp_path, split="train")


def test_file_names_that_are_not_utf_8_can_be_shown(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path)
    for name in (b"\xff.bin", b"a\xfe.jsonl"):
        Path(os.fsdecode(folder + b"/" + name)).write_bytes(ROW)
    assert unread_files(str(tmp_path)) == {r"\xff.bin": len(ROW)}
    (found,) = locate(str(tmp_path), cache_dir=tmp_path)
    changes = ledger.update(
        [found], None, write(tmp_path / "ledger" / "x").parent, domain=None, max_chars=99, rules="", unread={}
    )
    assert changes.fresh_pairs == 1
    (entry,) = ledger.read(tmp_path / "ledger")
    assert entry.file == r"a\xfe.jsonl"


def test_links_out_of_a_folder_are_refused(tmp_path: Path) -> None:
    """A delivery into a folder does not choose what else the pipeline reads."""
    secret = write(tmp_path / "elsewhere" / "secret.jsonl")
    folder = hub_folder(tmp_path / "set")
    (folder / "data" / "more.jsonl").symlink_to(folder / "data" / "train.jsonl")
    (folder / "again").symlink_to(folder / "data")
    (folder / "old.jsonl").symlink_to(folder / "gone.jsonl")
    inside = [folder / "data" / f"{name}.jsonl" for name in ("more", "test", "train")]
    assert locate(str(folder), cache_dir=tmp_path) == inside, "links inside it, and to nothing, do no harm"
    (tmp_path / "link").symlink_to(folder)
    assert len(locate(str(tmp_path / "link"), cache_dir=tmp_path)) == 3, "where the user says so is where it is"
    assert locate(str(tmp_path / "link"), cache_dir=tmp_path, split="test") == [folder / "data" / "test.jsonl"]
    (tmp_path / "one.jsonl").symlink_to(secret)
    assert locate(str(tmp_path / "one.jsonl"), cache_dir=tmp_path) == [tmp_path / "one.jsonl"]

    for target in (secret, Path("../../elsewhere/secret.jsonl")):
        link = folder / "data" / "dev.jsonl"
        link.symlink_to(target)
        for options in ({}, {"split": "validation"}):
            for look in (check, lambda path, **given: locate(path, cache_dir=tmp_path, **given)):
                with pytest.raises(QAdapterError, match=r"dev\.jsonl is, or lies behind, a link that leads out of"):
                    look(str(folder), **options)
        link.unlink()


def test_a_linked_folder_does_not_lead_out(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "test.jsonl")
    folder = tmp_path / "set"
    write(folder / "train.jsonl")
    (folder / "data").symlink_to(tmp_path / "elsewhere")
    assert locate(str(folder), cache_dir=tmp_path) == [folder / "train.jsonl"]
    assert locate(str(folder), cache_dir=tmp_path, split="train") == [folder / "train.jsonl"]
    with pytest.raises(QAdapterError, match="has no split 'test'"):
        locate(str(folder), cache_dir=tmp_path, split="test")


@pytest.mark.parametrize("name", ["../x", "a/../b", "/etc", "..", "a b", "a\n", ""])
def test_names_are_names(tmp_path: Path, name: str) -> None:
    folder = hub_folder(tmp_path / "set")
    for argument in ("split", "config_name"):
        with pytest.raises(QAdapterError, match="is not a name"):
            locate(str(folder), cache_dir=tmp_path, **{argument: name})
    with pytest.raises(QAdapterError, match="is not a name"):
        check("hub:owner/name", revision=name)


def test_arguments_without_meaning_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl")
    with pytest.raises(QAdapterError, match="`split: train` is not supported for file source"):
        check(str(file), split="train")
    with pytest.raises(QAdapterError, match="`config_name: x` is not supported for url source"):
        check("https://localhost/a", config_name="x")
    with pytest.raises(QAdapterError, match="`revision: main` is not supported for folder source"):
        check(str(tmp_path), revision="main")


def test_fingerprint_is_of_contents_and_of_what_is_read_together(tmp_path: Path) -> None:
    names = {"a": b"1", "b": b"2", "x/c": b"1", "x/d": b"2", "part-0": b"1", "part-1": b"2", "y/part-7": b"2"}
    a, b, c, d, part, other, apart = (write(tmp_path / name, content) for name, content in names.items())
    inner = "\n".join(sorted(hashlib.sha256(content).hexdigest() for content in (b"1", b"2")))
    assert (
        fingerprint([a, b]) == fingerprint([b, a]) == fingerprint([c, d]) == hashlib.sha256(inner.encode()).hexdigest()
    )
    assert fingerprint([a]) == fingerprint([c]) == fingerprint([part])
    assert fingerprint([part, other]) == fingerprint(
        [write(tmp_path / "z/shard1", b"2"), write(tmp_path / "z/shard2", b"1")]
    )
    assert fingerprint([part, apart]) == fingerprint([apart, part])
    unlike = [[a], [a, c], [b], [a, b], [b, c], [part, other], [part, b], [part, apart]]
    assert len({fingerprint(files) for files in unlike}) == len(unlike)
    with pytest.raises(QAdapterError, match="cannot be read"):
        fingerprint([tmp_path / "missing"])


# ------------------------------------------------------------------------------------------------ URLs


class Server(http.server.ThreadingHTTPServer):
    """A server whose answers the test sets, and that remembers what it was asked."""

    def __init__(self, answer: Callable[[http.server.BaseHTTPRequestHandler], None]) -> None:
        self.asked: list[tuple[str, str]] = []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.asked.append((self.command, self.path))
                answer(self)

            do_HEAD = do_GET  # noqa: N815 - the name that http.server looks for

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


def reply(
    request: http.server.BaseHTTPRequestHandler,
    status: int,
    body: bytes = b"",
    length: int | None = None,
    **headers: str,
) -> None:
    request.send_response(status)
    request.send_header("Content-Length", str(len(body) if length is None else length))
    for name, value in headers.items():
        request.send_header(name.replace("_", "-"), value)
    request.end_headers()
    if request.command == "GET":
        request.wfile.write(body)


class FileServer(Server):
    """Serves `content` under every path, with an ETag and single-byte ranges."""

    def __init__(self) -> None:
        self.content = ROW
        self.statuses: list[int] = []

        def answer(request: http.server.BaseHTTPRequestHandler) -> None:
            etag = f'"{hashlib.md5(self.content).hexdigest()}"'
            headers: dict[str, Any] = {}
            if request.path == "/missing":
                status, body = 404, b""
            elif request.headers.get("If-None-Match") == etag:
                status, body = 304, b""
            elif "Range" in request.headers:
                status, body = 206, self.content[:1]
                headers = {"Content_Range": f"bytes 0-0/{len(self.content)}"}
            else:
                status, body, headers = 200, self.content, {"ETag": etag}
            self.statuses.append(status)
            reply(request, status, body, **headers)

        super().__init__(answer)


@pytest.fixture
def server() -> Iterator[FileServer]:
    server = FileServer()
    yield server
    server.stop()


def test_url_is_fetched_once_until_it_changes(tmp_path: Path, server: FileServer) -> None:
    url = f"{server.url}/sets/a%20b.jsonl?token=1"
    (file,) = locate(url, cache_dir=tmp_path)
    assert file.read_bytes() == ROW
    assert file.parent == tmp_path / "urls"
    assert file.name.endswith("-a_b.jsonl")
    assert locate(url, cache_dir=tmp_path) == [file]
    assert server.statuses == [200, 304]
    server.content = ROW * 3
    assert locate(url, cache_dir=tmp_path)[0].read_bytes() == ROW * 3
    file.write_bytes(ROW)  # a copy that is not what was noted counts as none
    assert locate(url, cache_dir=tmp_path)[0].read_bytes() == ROW * 3
    assert server.statuses == [200, 304, 200, 200]
    assert sorted(path.name for path in file.parent.iterdir()) == [file.name, file.name + ".meta"]
    assert "token" not in (file.parent / (file.name + ".meta")).read_text()


def test_a_copy_that_a_power_cut_emptied_is_none(tmp_path: Path, server: FileServer) -> None:
    """Zeros of the right length, as a file system leaves them whose journal was ahead of its data."""
    url = f"{server.url}/a.jsonl"
    (file,) = locate(url, cache_dir=tmp_path)
    file.write_bytes(bytes(len(ROW)))
    assert locate(url, cache_dir=tmp_path)[0].read_bytes() == ROW
    assert server.statuses == [200, 200], "the server was not asked whether that copy is still good"
    file.write_bytes(bytes(len(ROW)))
    server.stop()
    with pytest.raises(UnreachableError, match="cannot be reached"):
        locate(url, cache_dir=tmp_path)


def test_a_copy_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, list[str]]] = []

    def sync(path: Path) -> None:
        whole = [file.suffix for file in sorted((tmp_path / "urls").iterdir()) if file.suffix != ".part"]
        synced.append((path.suffix, whole))

    monkeypatch.setattr(download, "sync_to_disk", sync)
    (file,) = locate(f"{server.url}/a.jsonl", cache_dir=tmp_path)
    assert synced == [(".part", []), ("", [".jsonl"]), (".part", [".jsonl"]), ("", [".jsonl", ".meta"])]
    note = json.loads((file.parent / f"{file.name}.meta").read_text())
    assert (note["size"], note["sha256"]) == (len(ROW), hashlib.sha256(ROW).hexdigest())


def test_url_check_asks_for_one_byte(tmp_path: Path, server: FileServer) -> None:
    assert check(f"{server.url}/a.jsonl") == SourceStatus(f"{server.url}/a.jsonl", "url", 1, len(ROW))
    assert server.statuses == [206]


def test_missing_url_is_no_reason_to_retry(tmp_path: Path, server: FileServer) -> None:
    for look in (check, lambda url: locate(url, cache_dir=tmp_path)):
        with pytest.raises(QAdapterError, match="was answered with 404") as caught:
            look(f"{server.url}/missing")
        assert not isinstance(caught.value, UnreachableError)
    assert list((tmp_path / "urls").iterdir()) == []


def test_a_download_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    server = Server(lambda request: reply(request, 200, ROW, length=1000))
    with pytest.raises(UnreachableError, match=f"broke off after {len(ROW)} of 1000 bytes"):
        locate(f"{server.url}/a.jsonl", cache_dir=tmp_path)
    server.stop()
    assert list((tmp_path / "urls").iterdir()) == []


def test_server_errors_may_be_retried_and_secrets_stay_out(tmp_path: Path) -> None:
    server = Server(lambda request: reply(request, 503))
    url = server.url.replace("http://", "http://me:password@") + "/a?key=secret"
    for look in (check, lambda url: locate(url, cache_dir=tmp_path)):
        with pytest.raises(UnreachableError) as caught:
            look(url)
        assert "password" not in str(caught.value)
        assert "secret" not in str(caught.value)
    server.stop()


def test_the_earlier_copy_serves_when_the_server_is_down(
    tmp_path: Path, server: FileServer, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"{server.url}/a.jsonl"
    (file,) = locate(url, cache_dir=tmp_path)
    server.stop()
    with pytest.raises(UnreachableError, match="cannot be reached"):
        check(url)
    with pytest.raises(UnreachableError, match="cannot be reached"):
        locate(url, cache_dir=tmp_path / "other")
    assert locate(url, cache_dir=tmp_path) == [file]
    assert "Using the copy of an earlier download" in caplog.text


@pytest.mark.parametrize("tail", ["..%2f..%2fescape.jsonl", "../../escape.jsonl", "..", "%00", "a" * 300, ""])
def test_urls_cannot_name_files_outside_the_cache(tmp_path: Path, server: FileServer, tail: str) -> None:
    (file,) = locate(f"{server.url}/x/{tail}", cache_dir=tmp_path / "cache")
    assert file.parent == tmp_path / "cache" / "urls"
    assert file.read_bytes() == ROW
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


@pytest.mark.parametrize(
    "url", ["http://", "http://[", "http://host:port/x", "nosuch://x/y", "zip://a.json::http://x/a.zip"]
)
def test_unusable_urls_are_refused(tmp_path: Path, url: str) -> None:
    for look in (check, lambda url: locate(url, cache_dir=tmp_path)):
        with pytest.raises(QAdapterError):
            look(url)


def test_other_file_systems(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/sets/a.jsonl", ROW)
    url = "memory://sets/a.jsonl"
    assert check(url) == SourceStatus(url, "url", 1, len(ROW))
    (file,) = locate(url, cache_dir=tmp_path)
    assert file.read_bytes() == ROW
    memory.pipe("/sets/a.jsonl", ROW * 2)
    assert locate(url, cache_dir=tmp_path)[0].read_bytes() == ROW * 2
    shards = {"b/one.parquet": ROW, "b/two.csv.gz": ROW * 3, "_SUCCESS": b"", "b/.part.jsonl": ROW}
    for name, content in shards.items():
        memory.pipe(f"/sets/{name}", content)
    assert check("memory://sets") == SourceStatus("memory://sets", "url", 3, 6 * len(ROW))
    assert [len(file.read_bytes()) for file in locate("memory://sets/b/", cache_dir=tmp_path)] == [
        len(ROW),
        3 * len(ROW),
    ]
    memory.rm("/sets/b", recursive=True)
    memory.rm("/sets/a.jsonl")
    with pytest.raises(QAdapterError, match="does not exist"):
        locate(url, cache_dir=tmp_path)


def test_a_cache_that_cannot_be_written_is_a_clear_error(tmp_path: Path, server: FileServer) -> None:
    write(tmp_path / "file")
    with pytest.raises(QAdapterError, match="cannot be stored in"):
        download.fetch(f"{server.url}/a.jsonl", tmp_path / "file")


# ------------------------------------------------------------------------------------------------ the hub

HUB_FILES = {
    "README.md": b"# a set",
    "data/train.jsonl": ROW * 2,
    "data/test.jsonl": ROW,
    "other/only.jsonl": ROW * 5,
    "loader.py": b"raise SystemExit('remote code ran')",
    "model.pkl": b"pickle",
}


def hub_answer(request: http.server.BaseHTTPRequestHandler) -> None:
    """The three calls of the hub's API that fetching a data set takes."""
    path, commit = request.path.split("?")[0], "a" * 40
    if path.startswith("/api/datasets/owner/name") and "/tree/" in path:
        rows = [{"type": "file", "path": name, "size": len(body), "oid": "0" * 40} for name, body in HUB_FILES.items()]
        reply(request, 200, json.dumps(rows).encode())
    elif path.startswith("/api/datasets/owner/name"):
        siblings = [{"rfilename": name, "size": len(body)} for name, body in HUB_FILES.items()]
        info = {"id": "owner/name", "sha": commit, "siblings": siblings, "tags": [], "private": False, "downloads": 0}
        reply(request, 200, json.dumps(info).encode())
    elif path.startswith("/datasets/owner/name/resolve/"):
        body = HUB_FILES[path.split("/", 6)[6]]
        reply(request, 200, body, ETag=f'"{hashlib.sha1(body).hexdigest()}"', X_Repo_Commit=commit)
    elif path.startswith("/api/datasets/gated"):
        reply(request, 403, X_Error_Code="GatedRepo")
    else:
        reply(request, 404, X_Error_Code="RepoNotFound")


HUB_CALLS = """
import sys
from pathlib import Path
from qadapter.preferences.sources import check, locate
for call in sys.stdin:
    try:
        print(eval(call))
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
"""


def hub_session(tmp_path: Path, calls: list[str], endpoint: str, offline: bool) -> list[str]:
    """The hub client reads its settings when it is imported, so each setting gets a process."""
    env = os.environ | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": str(int(offline)),
        "PYTHONPATH": str(PROJECT_ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", HUB_CALLS], input="\n".join(calls), env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_hub_data_sets(tmp_path: Path) -> None:
    server = Server(hub_answer)
    locations = [
        "locate('hub:owner/name', cache_dir=Path('unused'), split='test')",
        "locate('hub:owner/name', cache_dir=Path('unused'))",
        "locate('hub:owner/name', cache_dir=Path('unused'), split='dev', revision='main')",
        "locate('hub:owner/name/other', cache_dir=Path('unused'))",
        "locate('hf://datasets/owner/name@main/other', cache_dir=Path('unused'))",
    ]
    missing = ["locate('hub:owner/missing', cache_dir=Path('unused'))", "check('hub:owner/missing')"]
    checks = [
        "check('hub:owner/name')",
        "check('hub:owner/name/other')",
        "check('hub:owner/name/none')",
        "check('hub:gated/x')",
    ]
    online = hub_session(tmp_path, [*checks, *locations, *missing], server.url, offline=False)
    server.stop()

    snapshot = tmp_path / "hf" / "hub" / "datasets--owner--name" / "snapshots" / ("a" * 40)
    assert online[0] == repr(SourceStatus("hub:owner/name", "hub", 3, 8 * len(ROW)))
    assert online[1] == repr(SourceStatus("hub:owner/name/other", "hub", 1, 5 * len(ROW)))
    assert online[2].startswith("QAdapterError: hub:owner/name/none has no data files.")
    assert online[3].startswith("QAdapterError: hub:gated/x is gated")
    located = online[4:9]
    assert located[0] == repr([snapshot / "data" / "test.jsonl"])
    assert (
        located[1] == "QAdapterError: hub:owner/name needs a `split`. Its splits are test, train; set `split` to one."
    )
    assert located[2].startswith("QAdapterError: hub:owner/name has no split 'dev'.")
    assert located[3] == located[4] == repr([snapshot / "other" / "only.jsonl"])
    assert all(line.startswith("QAdapterError: The hub has no data set 'owner/missing'") for line in online[9:])
    assert not any(path.endswith((".py", ".pkl")) for _, path in server.asked)
    assert {path.suffix for path in snapshot.rglob("*.*")} == {".md", ".jsonl"}

    # What is cached is there without a network; the rest is refused with the way out.
    offline = hub_session(tmp_path, [*locations, *missing, checks[0]], server.url, offline=True)
    assert offline[:5] == located
    assert all("HF_HUB_OFFLINE=1 forbids to fetch it" in line for line in offline[5:7])
    assert offline[7] == online[0]


@pytest.mark.parametrize(
    "path",
    [
        "hf://owner/name",
        "hf://datasets/owner",
        "hf://datasets/o/n@%2e%2e/x",
        "hub:",
        "hub:name",
        "hub:../..",
        "hub:owner/..",
        "hub:owner/name/../x",
        "hub:o/n?x",
        "hub:o/ n",
    ],
)
def test_bad_hub_names_are_refused(tmp_path: Path, path: str) -> None:
    for look in (check, lambda path: locate(path, cache_dir=tmp_path)):
        with pytest.raises(QAdapterError, match="is not a hub data set"):
            look(path)


def test_real_folders(shared_data: Path, tmp_path: Path) -> None:
    assert [file.name for file in locate(str(shared_data / "hh-rlhf"), cache_dir=tmp_path)] == [
        "harmless-base.jsonl",
        "helpful.text-score.json",
    ]
    assert check(str(shared_data / "dsp")).files == 1
