"""Weight files from the network: resumed, verified, kept, and from then on used without a network.

    FOLDER/NAME                  the file, whole or absent: it gets its name when its digest is known
    FOLDER/.download/NAME.part   what came so far; a killed or interrupted download goes on from there
    FOLDER/.download/NAME.json   the address, how the server names the version, length, digest
    FOLDER/.download/NAME.lock   held by the process that downloads; the others wait, then find the file

A transfer goes on with `Range` and `If-Range` (RFC 9110, sections 13.1.5 and 14.2) where the server names the
version of the file and the version is still the same; otherwise it starts over. The length is compared with
`Content-Length` or `Content-Range`, SHA-256 is computed over the whole file on the disk. A server that
announces fewer bytes than it has ends the file there for every client: only a known digest notices that.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
import ssl
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

import httpx2
from filelock import FileLock
from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from vitrail.files import write_whole

_TIMEOUT_S = 30.0
"""How long a server may be silent."""
_WAITS_S = (1.0, 2.0, 4.0, 8.0)
"""Waits before the next try; a try that brought something new begins them again."""
_CUT = (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError)
_UNREACHABLE = (httpx2.ConnectError, httpx2.ConnectTimeout)
_PASSING_STATUS = (408, 425, 429)
_COPIED_AT_ONCE = 1 << 20


class _CutError(Exception):
    """A transfer that stopped for a reason that may pass."""

    def __init__(self, reason: str, *, unreachable: bool = False, drop: bool = False) -> None:
        super().__init__(reason)
        self.unreachable = unreachable
        """There was no connection to the server."""
        self.drop = drop
        """What came so far is of no use."""


@dataclass(frozen=True, kw_only=True)
class _Record:
    """What is known of a download, also by later processes."""

    url: str
    validator: str | None = None
    """How the source names this version of the file; without it nothing can be resumed."""
    length: int | None = None
    """Bytes of the whole file."""
    sha256: str | None = None
    """Digest of the whole file, once it is here."""


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """A file that is wanted, and the files beside it; the module's docstring says what they hold."""

    url: str
    target: Path
    digest: str | None
    """SHA-256 that the file must have, or its beginning."""

    @property
    def local(self) -> Path | None:
        """The source, where it is a local file."""
        address = urlsplit(self.url)
        return Path(url2pathname(address.path)) if address.scheme == "file" else None

    @property
    def part(self) -> Path:
        return self._beside(".part")

    @property
    def lock(self) -> Path:
        return self._beside(".lock")

    def received(self) -> int:
        """Bytes of the part file."""
        return self.part.stat().st_size if self.part.exists() else 0

    def read_record(self) -> _Record:
        """An empty one where there is none of this address, or a damaged one."""
        try:
            record = _Record(**json.loads(self._beside(".json").read_bytes()))
        except (FileNotFoundError, ValueError, TypeError):
            return _Record(url=self.url)
        return record if record.url == self.url else _Record(url=self.url)

    def write_record(self, record: _Record) -> None:
        write_whole(self._beside(".json"), json.dumps(dataclasses.asdict(record)) + "\n")

    def _beside(self, suffix: str) -> Path:
        return self.target.parent / ".download" / (self.target.name + suffix)


@dataclass(frozen=True, kw_only=True)
class _Body:
    """What a source gives: the file from one byte on."""

    start: int
    record: _Record
    chunks: Iterator[bytes]


_Source = Callable[[_Record, int], AbstractContextManager[_Body]]
"""Takes what is known of a file and how many of its bytes are here; gives the others, or all."""
_Show = Callable[[int, int | None], None]
"""Takes the bytes that are here and the bytes of the whole file, where that is known."""


def download(
    url: str, *, sha256: str | None = None, folder: Path | None = None, progress: bool = True
) -> Path:
    """Download a file, or find it where an earlier call put it.

    A file that is here is used without a network, whatever its address gives by now. Its digest is computed
    each time: a file that was damaged since is downloaded again. A local source that changed is copied again.

    Args:
        url: An http, https or file address. The last part of its path names the file; signs other than
            letters, digits and `_.+-` become `_`.
        sha256: The file's digest, 64 hexadecimal digits. When not given, a name like `vit-1a2b3c4d.pth`
            states the digest's beginning, as torch.hub has it (8 digits or more).
        folder: Where the file goes, made when it does not exist. When not given, a folder for this address
            under `weights` in the folder VITRAIL_CACHE, else in ~/.cache/vitrail.
        progress: Say on stderr how it goes: a bar on a terminal, and one line at the end.

    Returns:
        The file.

    Raises:
        ValueError: Not such an address, the server or the file cannot be reached or read, the length or the
            digest is wrong, or the folder cannot be written; one line. Nothing half-written has the file's
            name then, and what came is kept for the next call unless it was wrong.
    """
    name = _file_name(url)
    digest = _stated_digest(sha256, name)
    wanted = _Wanted(url=url, target=(folder or _folder_of(url)) / name, digest=digest)
    try:
        # Before anything is written: a shared folder may be read-only.
        if _is_kept(wanted):
            return wanted.target
        wanted.lock.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(wanted.lock):
            # Another process may have been first.
            if not _is_kept(wanted):
                _fetch(wanted, progress)
    except OSError as error:
        raise ValueError(
            f"{wanted.target} cannot be made ({_one_line(error)}): make room there, or choose another folder "
            "(VITRAIL_CACHE sets the usual one)"
        ) from None
    return wanted.target


def _file_name(url: str) -> str:
    """The name under which the content of an address is kept."""
    try:
        address = urlsplit(url)
    except ValueError as error:
        raise ValueError(f"{url!r} is not an address ({error}); expected http, https or file") from None
    if address.scheme not in ("http", "https", "file"):
        raise ValueError(f"expected an address with http://, https:// or file://, got {url!r}")
    if address.scheme == "file" and address.netloc not in ("", "localhost"):
        raise ValueError(f"{url!r} is a file of another machine: expected file:///PATH or an http address")
    # Without leading dots, as `..` and `.download` have them.
    name = re.sub(r"[^\w.+-]", "_", PurePosixPath(unquote(address.path)).name).lstrip(".")
    if not name:
        raise ValueError(f"{url!r} names no file: expected https://HOST/PATH/NAME")
    return name


def _folder_of(url: str) -> Path:
    """One folder an address, as half of the world's weights are called model.safetensors."""
    home = Path(os.environ.get("VITRAIL_CACHE") or Path.home() / ".cache" / "vitrail")
    return home / "weights" / hashlib.sha256(url.encode()).hexdigest()[:16]


def _stated_digest(sha256: str | None, name: str) -> str | None:
    """The digest or its beginning, in small letters; None where nothing states it."""
    if sha256 is None:
        stated = re.search(r"-([0-9a-f]{8,64})\.", name)
        return stated[1] if stated else None
    if not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise ValueError(f"sha256: expected 64 hexadecimal digits, got {sha256!r}")
    return sha256.lower()


def _is_kept(wanted: _Wanted) -> bool:
    """Whether the file is here, whole and unchanged.

    Raises:
        ValueError: There is another file of that name; it is not touched.
    """
    if not wanted.target.exists():
        return False
    record = wanted.read_record()
    expected = wanted.digest or record.sha256
    if expected is None:
        raise ValueError(
            f"{wanted.target} exists and was not downloaded from {wanted.url}: move it, choose another "
            "folder, or give its sha256"
        )
    source = wanted.local
    if record.sha256 and source and source.exists() and _version(source.stat()) != record.validator:
        return False
    came = _digest(wanted.target)
    if came.startswith(expected):
        return True
    if record.sha256 and came != record.sha256:
        return False  # damaged since it was downloaded
    raise ValueError(
        f"{wanted.target} has another content: sha256 expected {expected}, got {came}; move it or choose "
        "another folder"
    )


def _fetch(wanted: _Wanted, progress: bool) -> None:
    """Get the file under its name; the lock is held."""
    began = time.monotonic()
    wanted.target.unlink(missing_ok=True)  # it is damaged, or an old version
    with _shown(wanted.target.name, progress) as show:
        if wanted.local:
            record = _receive(wanted, functools.partial(_from_file, wanted.local), show)
        else:
            with httpx2.Client(timeout=_TIMEOUT_S, follow_redirects=True, verify=_trusted()) as client:
                record = _receive(wanted, functools.partial(_from_server, client, wanted.digest), show)
    came = _digest(wanted.part)
    if wanted.digest and not came.startswith(wanted.digest):
        wanted.part.unlink()
        raise ValueError(
            f"{wanted.url} gave another file: sha256 expected {wanted.digest}, got {came}; check the address "
            "or give the sha256 that its publisher states"
        )
    # First the record: a file without one passes for somebody else's.
    wanted.write_record(dataclasses.replace(record, sha256=came))
    os.replace(wanted.part, wanted.target)
    if progress:
        size, seconds = decimal(wanted.target.stat().st_size), time.monotonic() - began
        print(f"downloaded {wanted.target} ({size}, {seconds:.0f} s)", file=sys.stderr, flush=True)


def _receive(wanted: _Wanted, source: _Source, show: _Show) -> _Record:
    """Fill the part file, in as many tries as it takes; gives what the source says of the file."""
    record = wanted.read_record()
    most, waits, reached = 0, iter(_WAITS_S), False
    while True:
        have = wanted.received() if record.validator else 0
        if have and have == record.length:
            return record
        try:
            with source(record, have) as body:
                record = body.record
                _append(wanted, body, show)
            if record.length in (None, wanted.received()):
                return record
            reason = f"the answer ended after {wanted.received():,} of {record.length:,} bytes"
        except _CutError as error:
            if error.unreachable and not reached:
                raise ValueError(
                    f"{wanted.url} cannot be reached: {error}; check the address and the network"
                ) from None
            if error.drop:
                wanted.part.unlink(missing_ok=True)
            reason = str(error)
        reached = True
        if wanted.received() > max(have, most):
            most, waits = wanted.received(), iter(_WAITS_S)
        wait = next(waits, None)
        if wait is None:
            raise ValueError(
                f"{wanted.url} cannot be downloaded: {reason}; {wanted.received():,} bytes came, try again "
                "later"
            )
        time.sleep(wait)


def _append(wanted: _Wanted, body: _Body, show: _Show) -> None:
    """Write what comes to the end of the part file; all of it is there, whatever stops the transfer."""
    if body.start == 0:
        # In this order: the record must never describe another file's part.
        wanted.part.unlink(missing_ok=True)
        wanted.write_record(body.record)
    done, length = body.start, body.record.length
    with wanted.part.open("ab") as file:
        for chunk in body.chunks:
            file.write(chunk)
            done += len(chunk)
            show(done, length)
            if length is not None and done > length:
                break
        file.flush()
        os.fsync(file.fileno())
    if length is not None and done > length:
        wanted.part.unlink()
        raise ValueError(
            f"{wanted.url} cannot be downloaded: expected the {length:,} bytes that were announced, and more "
            "came; try another address"
        )


@contextmanager
def _from_server(client: httpx2.Client, digest: str | None, record: _Record, have: int) -> Iterator[_Body]:
    """Ask a server for the bytes that are missing; errors of the connection come as ours."""
    headers = {"Accept-Encoding": "identity"}  # compressed, neither length nor digest would be the file's
    if have and record.validator:
        headers |= {"Range": f"bytes={have}-", "If-Range": record.validator}
    try:
        with client.stream("GET", record.url, headers=headers) as response:
            if have and response.status_code in (206, 416):
                yield _rest(response, record, have)
            else:
                yield _whole(response, record.url, digest)
    except _CUT as error:
        raise _CutError(_one_line(error), unreachable=isinstance(error, _UNREACHABLE)) from None
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise ValueError(
            f"{record.url} cannot be downloaded: {_one_line(error)}; check the address"
        ) from None


def _rest(response: httpx2.Response, record: _Record, have: int) -> _Body:
    """The answer of a server that goes on where it was asked to, and with the same file."""
    extent = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    length = int(extent[2]) if extent and extent[2] != "*" else record.length
    goes_on = extent is not None and int(extent[1]) == have and record.length in (None, length)
    # Some servers know Range and not If-Range. The validator may be left out, as the question has it.
    if not goes_on or _validator(response) not in (None, record.validator):
        raise _CutError("the file changed on the server", drop=True)
    return _Body(start=have, record=dataclasses.replace(record, length=length), chunks=response.iter_raw())


def _whole(response: httpx2.Response, url: str, digest: str | None) -> _Body:
    """The answer of a server that gives the file from its beginning."""
    headers, status = response.headers, response.status_code
    said = f"the server answers {status} {response.reason_phrase}".rstrip()
    if status in _PASSING_STATUS or status >= 500:
        raise _CutError(said)
    if status != 200:
        raise ValueError(f"{url} cannot be downloaded: {said}; check the address")
    if headers.get("Content-Encoding", "identity") != "identity":
        raise ValueError(
            f"{url} cannot be downloaded: expected the file as it is, got it {headers['Content-Encoding']}-"
            "encoded; use another address"
        )
    chunked = "Transfer-Encoding" in headers
    length = int(headers["Content-Length"]) if "Content-Length" in headers and not chunked else None
    if length is None and not chunked and digest is None:
        raise ValueError(
            f"{url} cannot be downloaded safely: the server does not say how long the file is, and a cut "
            "connection would pass for its end; give the file's sha256"
        )
    record = _Record(url=url, validator=_validator(response), length=length)
    return _Body(start=0, record=record, chunks=response.iter_raw())


def _validator(response: httpx2.Response) -> str | None:
    """What names a file's version byte by byte, which a weak ETag does not (RFC 9110, section 8.8.1)."""
    etag = response.headers.get("ETag")
    if etag is not None and not etag.startswith("W/"):
        return etag
    return response.headers.get("Last-Modified")


@contextmanager
def _from_file(path: Path, record: _Record, have: int) -> Iterator[_Body]:
    """The bytes of a local file that are missing."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise ValueError(f"{record.url} cannot be read: {error.strerror}; check the path") from None
    with file:
        found = os.fstat(file.fileno())
        version = _version(found)
        start = have if version == record.validator else 0
        file.seek(start)
        yield _Body(
            start=start,
            record=_Record(url=record.url, validator=version, length=found.st_size),
            chunks=iter(lambda: file.read(_COPIED_AT_ONCE), b""),
        )


def _version(found: os.stat_result) -> str:
    return f"{found.st_mtime_ns}-{found.st_size}"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache
def _trusted() -> ssl.SSLContext:
    """The machine's certificates; reading them takes longer than a small download."""
    return httpx2.create_ssl_context()


@contextmanager
def _shown(name: str, progress: bool) -> Iterator[_Show]:
    """Show a bar for the while, where somebody sees it."""
    if not progress or not sys.stderr.isatty():
        yield lambda done, length: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, length: bar.update(task, completed=done, total=length)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
