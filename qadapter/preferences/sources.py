"""From what a config names (file, folder, URL, hub id) to local files.

Nothing is executed on the way: data sets come as data files (no loading scripts, no pickle, no archives), and no name
in a URL or a data set's card, and no link in a folder, can lead outside the folder it belongs to.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Literal
from urllib.parse import unquote, urlsplit

from huggingface_hub import HfApi, errors, is_offline_mode, snapshot_download

from qadapter.errors import QAdapterError, nearest
from qadapter.files.folders import refuse_links_out, shown_path
from qadapter.files.shown import shown
from qadapter.preferences import cards, download
from qadapter.preferences.parts import part_of

_TEXTS, _PACKED = (".json", ".jsonl", ".ndjson", ".csv", ".tsv"), (".gz", ".zst", ".bz2", ".xz")
DATA_SUFFIXES = (
    *(text + packed for packed in ("", *_PACKED) for text in _TEXTS),
    *(".parquet", ".arrow", ".zip"),
)
DATA_ENDINGS = f"{', '.join(_TEXTS)} (each also with {', '.join(_PACKED)}), .parquet, .arrow, .zip"
"""The endings for people. Upper and lower case do not matter."""

# What `datasets` writes beside the rows.
NOT_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
# What lies beside data and is no delivery: notes, licences, checksums, markers of other tools, files half-written.
_BESIDE_DATA = re.compile(
    r"(readme|licen[cs]e).*|_(success|started|committed|temporary).*|thumbs\.db|desktop\.ini|.*~"
    r"|.*\.(md|rst|sha\d*|md5|crc|asc|sig|tmp|temp|part|partial|filepart|crdownload|swp|bak|lock)",
    re.IGNORECASE,
)
HUB_TIMEOUT_SECONDS = 20.0

Kind = Literal["file", "folder", "url", "hub"]


class NoDataError(QAdapterError):
    """No data file lies where a source may have some: nothing was delivered yet, or it was all taken away."""


class MissingPathError(QAdapterError):
    """A local path does not exist, and neither does the folder that it should lie in."""


@dataclass(frozen=True, slots=True)
class SourceStatus:
    """What `check` found behind a path without fetching it.

    Attributes:
        path: as it was given.
        kind: how it was understood.
        files: number of data files; None where the server does not say.
        bytes: their size as stored or sent; None where the server does not say.
    """

    path: str
    kind: Kind
    files: int | None
    bytes: int | None


def locate(
    path: str, *, cache_dir: Path, split: str | None = None, revision: str | None = None, config_name: str | None = None
) -> list[Path]:
    """Local files with the data of a source, fetched if they are not there yet.

    Args:
        path: a file; a folder (every data file below it); an `http(s)://` URL of one file; another fsspec URL (an
            object store) of a file or folder; or `hub:owner/name`, `hub:owner/name/folder` for a data set of the
            Hugging Face hub, which may also be written `hf://datasets/owner/name@revision/folder`.
        cache_dir: downloads from URLs go here; those of the hub go to the hub's own cache (`HF_HOME`).
        split: for folders and hub data sets, the split as its card or its file names declare it. A hub data set with
            several splits needs it; a folder without it gives all its files.
        revision: for the hub, a branch, tag or commit.
        config_name: for folders and hub data sets whose card lists `configs`, the one to use.

    Returns:
        Existing files in sorted order, at least one.

    Raises:
        NoDataError: a folder without a data file, or a path that does not exist in a folder that does.
        MissingPathError: a path that does not exist, nor its folder.
        QAdapterError: the source cannot be read, or the arguments do not fit its kind.
        download.UnreachableError: a server could not be reached; trying again may help.
    """
    kind = _check_arguments(path, split=split, revision=revision, config_name=config_name)
    if kind == "url":
        return [download.fetch(url, cache_dir / "urls") for url in _urls(path)]
    if kind == "hub":
        folder, files = _hub_files(path, revision)
        if _ends_as_data(PurePosixPath(path)) and len(files) == 1 and (split or config_name):
            raise QAdapterError(f"split and config_name are not supported for the single file {path}; remove them.")
        return _select(path, folder, split, config_name) if len(files) > 1 or split or config_name else files
    return _local_files(path, kind, split, config_name)


def check(
    path: str, *, split: str | None = None, revision: str | None = None, config_name: str | None = None
) -> SourceStatus:
    """Whether a source is there, asked without downloading its data. Arguments and errors are those of `locate`."""
    kind = _check_arguments(path, split=split, revision=revision, config_name=config_name)
    if kind == "url":
        sizes = [download.size(url) for url in _urls(path)]
        return SourceStatus(path, kind, len(sizes), None if None in sizes else sum(size or 0 for size in sizes))
    if kind == "hub":
        return _check_hub(path, revision)
    files = _local_files(path, kind, split, config_name)
    return SourceStatus(path, kind, len(files), sum(file.stat().st_size for file in files))


def unread_files(path: str) -> dict[str, int]:
    """What lies in a folder and is not read, because its name has no ending of a data file.

    `week3.xlsx` and `week3.tar` are such files. Hidden files, notes (README, licences, .md), checksums and names of
    files that are not whole yet are left out. Nothing is opened.

    Returns:
        The files' names relative to the folder (`packed.shown_path`), sorted, with their sizes in bytes; empty where
        `path` is no folder.
    """
    if path.startswith("hub:") or ("://" in path and not path.startswith("file://")):
        return {}
    folder = _plain(path)
    found = {}
    for file in _files_below(folder) if folder.is_dir() else ():
        name = file.relative_to(folder)
        known = _ends_as_data(name) or name.name in NOT_DATA or _BESIDE_DATA.fullmatch(name.name)
        if not known and not _is_hidden(name):
            try:
                found[shown_path(name)] = file.lstat().st_size
            except OSError:  # taken away meanwhile
                continue
    return dict(sorted(found.items()))


def refuse_changed(files: Iterable[Path], before: str, path: str) -> None:
    """After files were read: what was read is what had been fingerprinted, so that no result gets a wrong name.

    Args:
        files: the ones read.
        before: their fingerprint before that.
        path: the source, for the message.

    Raises:
        QAdapterError: their content is another one now.
    """
    if fingerprint(files) != before:
        raise QAdapterError(
            f"files of {shown(path)} changed while they were read, so nothing was made of them; run again. Write new "
            "files under a hidden name (.name) and rename them when they are whole"
        )


def fingerprint(files: Iterable[Path]) -> str:
    """sha256 over the files' contents, and which of them are read together (`shards.py`).

    Two arrangements of the same contents may be read differently: files of one folder, or parts of one whole, have one
    layout. Apart from that their names, places and order do not matter.

    Raises:
        QAdapterError: a file cannot be read.
    """
    together: dict[tuple[Path, tuple[str, str] | None], list[str]] = {}
    for file in files:
        try:
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise QAdapterError(
                f"{shown_path(file)} cannot be read: {error.strerror}. Check the path and its permissions."
            ) from error
        together.setdefault((file.parent, part_of(file.name)), []).append(digest)
    digests = [digest for group in together.values() for digest in group]
    text = "\n".join(sorted(digests))
    folders = {folder for folder, _ in together}
    if len(digests) > 1 and (len(folders) > 1 or any(part for _, part in together)):
        groups = [
            sorted([part is not None, sorted(group)] for (place, part), group in together.items() if place == folder)
            for folder in folders
        ]
        text += f"\n{json.dumps(sorted(groups))}"
    return hashlib.sha256(text.encode()).hexdigest()


# ------------------------------------------------------------------------------------------- kinds and arguments


def _check_arguments(path: str, *, split: str | None, revision: str | None, config_name: str | None) -> Kind:
    kind = _kind(path)
    for name, value in {"split": split, "revision": revision, "config_name": config_name}.items():
        if value is None:
            continue
        # Branch names may have slashes; a part of dots alone never is a name.
        if not re.fullmatch(r"[\w.+/-]+", value) or ".." in value or value.startswith("/"):
            raise QAdapterError(
                f"{name} '{value}' of {path} is not a name; letters, digits, '-', '_' and '.' were expected."
            )
        if kind in ("file", "url") or (name == "revision" and kind == "folder"):
            raise QAdapterError(f"`{name}: {value}` is not supported for {kind} source {path}; remove it.")
    return kind


def _kind(path: str) -> Kind:
    if path.startswith(("hub:", "hf://")):
        return "hub"
    if "://" in path and not path.startswith("file://"):
        return "url"
    return "folder" if _local(path).is_dir() else "file"


def _local(path: str) -> Path:
    """A local path that exists; else an error that names its nearest neighbours."""
    if not path.strip():
        raise QAdapterError("The path of a source is empty; give a file, a folder, a URL or hub:owner/name.")
    try:
        local = _plain(path)
        if local.is_file() or local.is_dir():
            return local
        missing, parent = local, local.parent
        while not parent.is_dir() and parent != parent.parent:
            missing, parent = parent, parent.parent
    except (OSError, ValueError, RuntimeError) as error:  # no permission, too long a name, no home folder
        reason = getattr(error, "strerror", None) or error
        raise QAdapterError(
            f"{path[:200]} cannot be looked up: {reason}. Check the path and its permissions."
        ) from error
    try:
        names = {name.lower(): name for name in os.listdir(parent)}  # noqa: PTH208 - names are all that is wanted
    except OSError:
        names = {}
    close = nearest(missing.name.lower(), names, 3)
    hint = f"Did you mean {' or '.join(str(parent / names[name]) for name in close)}?" if close else "Check the path."
    kind = NoDataError if missing == local else MissingPathError
    raise kind(f"{path} does not exist: there is no '{missing.name}' in {parent}. {hint}")


def _plain(path: str) -> Path:
    plain = unquote(urlsplit(path).path) if path.startswith("file://") else path
    return Path(plain).expanduser().absolute()


def _urls(path: str) -> list[str]:
    """The URLs of a source's files: itself, or the data files of a folder in an object store."""
    try:
        urls = download.files_below(path, lambda name: _is_data(PurePosixPath(name)))
    except download.UnreachableError:
        return [path]  # a file may have a copy from an earlier download
    if not urls:
        raise NoDataError(f"{shown(path)} has no data files. Files ending in {DATA_ENDINGS} were expected in it.")
    return urls


# ------------------------------------------------------------------------------------------- folders


def _is_data(name: PurePosixPath | Path) -> bool:
    cached = name.name.startswith("cache-") and name.suffix == ".arrow"  # results of `datasets.map`, not data
    return _ends_as_data(name) and name.name not in NOT_DATA and not _is_hidden(name) and not cached


def _ends_as_data(name: PurePosixPath | Path) -> bool:
    return name.name.lower().endswith(DATA_SUFFIXES)


def _is_hidden(name: PurePosixPath | Path) -> bool:
    return any(part.startswith(".") for part in name.parts)


def _files_below(folder: Path) -> Iterator[Path]:
    return (Path(place, name) for place, _, names in os.walk(folder) for name in names)


def _local_files(path: str, kind: Kind, split: str | None, config_name: str | None) -> list[Path]:
    local = _local(path)
    if kind == "file":
        return [local]
    files = _data_files(path, local)
    if split or config_name:
        files = _select(path, local, split, config_name)
    refuse_links_out(local, files, path)
    return files


def _data_files(path: str, folder: Path) -> list[Path]:
    files = sorted(file for file in _files_below(folder) if _is_data(file.relative_to(folder)) and file.is_file())
    if not files:
        raise NoDataError(
            f"The folder {path} has no data files. Files ending in {DATA_ENDINGS} were expected in it or "
            "below; name the folder that holds them."
        )
    return files


def _select(path: str, folder: Path, split: str | None, config_name: str | None) -> list[Path]:
    """The files of one split and config, as the data set's card or its file names declare them."""
    from datasets import load_dataset_builder  # takes a second to import, which runs on files do not need

    folder = folder.resolve()
    cards.check(path, folder)
    try:
        with TemporaryDirectory() as scratch:  # for the builder's lock file; it builds nothing
            builder = load_dataset_builder(str(folder), name=config_name, cache_dir=scratch)
    except Exception as error:  # the library raises its own, yaml's, fsspec's and pyarrow's errors here
        reason = str(error).split("\nExample of usage")[0].replace("\n", " ")
        raise QAdapterError(
            f"The splits of {path} cannot be read: {reason}. A folder with `train`/`test` files or a card that lists "
            "`configs` was expected; correct `split` or `config_name`."
        ) from error
    splits = {str(name): files for name, files in (builder.config.data_files or {}).items()}
    if split is None and len(splits) == 1:
        split = next(iter(splits))
    if split not in splits:
        given = "needs a `split`" if split is None else f"has no split '{split}'"
        raise QAdapterError(
            f"{path} {given}. Its splits are {', '.join(sorted(splits)) or '(none)'}; set `split` to one."
        )
    files = sorted(Path(os.path.normpath(file)) for file in splits[split])
    # A data set's card may name any pattern, `../..` as well. Links inside the folder are the hub cache's own.
    if not files or not all(file.is_relative_to(folder) and file.is_file() for file in files):
        raise QAdapterError(
            f"The split '{split}' of {path} names no files inside the data set's folder; check its card."
        )
    return files


# ------------------------------------------------------------------------------------------- the hub


def _hub_id(path: str) -> tuple[str, str, str | None]:
    """`hub:owner/name[/folder or file]` or its `hf://` address as (owner/name, folder or file or '', revision)."""
    name = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
    match = re.fullmatch(rf"hub:({name})()((?:/[\w.-]+)*)/?", path) or re.fullmatch(
        rf"hf://datasets/({name})((?:@[\w.%-]+)?)((?:/[\w.-]+)*)/?", path
    )
    if match is None or ".." in unquote(path):
        raise QAdapterError(
            f"'{path}' is not a hub data set. hub:owner/name, hub:owner/name/folder or "
            "hf://datasets/owner/name@revision/folder was expected, for example hub:Anthropic/hh-rlhf/harmless-base."
        )
    return match.group(1), match.group(3).strip("/"), unquote(match.group(2)[1:]) or None


def _hub_place(path: str, revision: str | None) -> tuple[str, str, str | None]:
    """As `_hub_id`, with the revision of the settings where the address has none."""
    repository, place, named = _hub_id(path)
    if named and revision and named != revision:
        raise QAdapterError(f"{path} names the revision '{named}', and `revision` is '{revision}'; remove one of them.")
    return repository, place, named or revision


def _hub_files(path: str, revision: str | None) -> tuple[Path, list[Path]]:
    repository, place, revision = _hub_place(path, revision)
    prefix = f"{place}/" if place else ""
    wanted = [f"{prefix}*{suffix}" for suffix in DATA_SUFFIXES] + [f"{prefix}README.md"]
    if _ends_as_data(PurePosixPath(place)):
        wanted.append(place)
    try:
        snapshot = Path(
            snapshot_download(repository, repo_type="dataset", revision=revision, allow_patterns=wanted)
        ).absolute()
    except Exception as error:  # httpx's, requests' and the hub's own errors have no common base
        raise _hub_error(path, repository, revision, error) from error
    if place and (snapshot / place).is_file():
        return (snapshot / place).parent, [snapshot / place]
    if not (snapshot / place).is_dir():
        raise QAdapterError(f"{path}: the data set {repository} has no folder '{place}' with data files in it.")
    return snapshot / place, _data_files(path, snapshot / place)


def _check_hub(path: str, revision: str | None) -> SourceStatus:
    repository, place, revision = _hub_place(path, revision)
    if is_offline_mode():  # then only what is cached can be had, and looking costs nothing
        _, files = _hub_files(path, revision)
        return SourceStatus(path, "hub", len(files), sum(file.stat().st_size for file in files))
    try:
        info = HfApi().dataset_info(repository, revision=revision, files_metadata=True, timeout=HUB_TIMEOUT_SECONDS)
    except Exception as error:  # as in `_hub_files`
        raise _hub_error(path, repository, revision, error) from error
    names = [(PurePosixPath(file.rfilename), file.size) for file in info.siblings or []]
    sizes = [size for name, size in names if _is_data(name) and (not place or name.is_relative_to(place))]
    if not sizes:
        raise QAdapterError(f"{path} has no data files. Files ending in {DATA_ENDINGS} were expected.")
    known = [size for size in sizes if size is not None]
    return SourceStatus(path, "hub", len(sizes), sum(known) if len(known) == len(sizes) else None)


def _hub_error(path: str, repository: str, revision: str | None, error: Exception) -> QAdapterError:
    if is_offline_mode():
        return QAdapterError(
            f"{path} is not in the local hub cache, and HF_HUB_OFFLINE=1 forbids to fetch it. Unset HF_HUB_OFFLINE, or "
            f"run `hf download --repo-type dataset {repository}` where there is a network, or give a local folder."
        )
    if isinstance(error, errors.GatedRepoError):
        return QAdapterError(f"{path} is gated: accept its terms on its page and log in with `hf auth login`.")
    if isinstance(error, errors.RevisionNotFoundError):
        return QAdapterError(f"{path} has no revision '{revision}'; give one of its branches, tags or commits.")
    if isinstance(error, errors.RepositoryNotFoundError):
        return QAdapterError(
            f"The hub has no data set '{repository}' that you may read. Check owner and name, "
            "or log in with `hf auth login`."
        )
    return download.UnreachableError(
        f"The hub could not be asked for {path} ({type(error).__name__}). Check the network and try again, "
        "or give a local folder."
    )
