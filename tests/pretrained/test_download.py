"""Downloads from a server that cuts the connection, lies, changes its file, is slow or gone."""

from __future__ import annotations

import contextlib
import email.utils
import functools
import hashlib
import os
import pty
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from vitrail.pretrained import download as module
from vitrail.pretrained.download import download

CONTENT = hashlib.shake_256(b"weights").digest(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
CUT = 100_000
TRIES = 5
LAST_MODIFIED = email.utils.formatdate(1_700_000_000, usegmt=True)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """How the server answers one request."""

    status: int = 200
    """Another one than 200 comes without the file."""
    location: str | None = None
    cut: int | None = None
    """Bytes of the body after which the connection is closed."""
    announce: int = 0
    """Added to the length that the server announces."""
    more: int = 0
    """Bytes sent after those that the range names."""
    at_most: int | None = None
    """Bytes of a range that are given of those that were asked for."""
    silence: float = 0.0
    """Seconds before the body."""
    framing: str = "length"
    """Or `chunked`, or `close`: the end of the connection is the end of the file."""
    encoding: str | None = None
    then: Callable[[], object] | None = None
    """Called when all bytes but a cut's rest are sent, before the connection is closed."""


@dataclass
class Server:
    """What the server has, and what it was asked."""

    url: str = ""
    content: bytes = CONTENT
    etag: str | None = '"one"'
    modified: str | None = None
    ranges: bool = True
    if_range: bool = True
    """Whether it looks at If-Range."""
    answers: list[Answer] = field(default_factory=lambda: [Answer()])
    """The last one is the answer to all further requests."""
    asked: list[tuple[str, str | None, str | None]] = field(default_factory=list)
    """Path, Range and If-Range of each request."""

    @property
    def ranges_asked(self) -> list[str | None]:
        return [asked for _, asked, _ in self.asked]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, server: Server, *arguments: object) -> None:
        self.has = server
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        has, asked = self.has, self.headers.get("Range")
        has.asked.append((self.path, asked, self.headers.get("If-Range")))
        answer = has.answers.pop(0) if len(has.answers) > 1 else has.answers[0]
        # The client closes the connection when it has seen enough.
        with contextlib.suppress(ConnectionError):
            self.answer(answer, asked)

    def answer(self, answer: Answer, asked: str | None) -> None:
        has, status, start, stop = self.has, answer.status, 0, len(self.has.content)
        if status != 200:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.send_header("Connection", "close")
            if answer.location is not None:
                self.send_header("Location", answer.location)
            self.end_headers()
            return
        same = self.headers.get("If-Range") in (None, has.etag, has.modified)
        if asked is not None and has.ranges and (same or not has.if_range):
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            status = 206 if start < stop else 416
            stop = stop if answer.at_most is None else min(stop, start + answer.at_most)
        body = has.content[start:stop] + bytes(answer.more)
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(has.content)}")
        elif status == 416:
            self.send_header("Content-Range", f"bytes */{len(has.content)}")
        for name, value in (
            ("Connection", "close"),
            ("ETag", has.etag),
            ("Last-Modified", has.modified),
            ("Content-Encoding", answer.encoding),
            ("Transfer-Encoding", "chunked" if answer.framing == "chunked" else None),
            ("Content-Length", str(len(body) + answer.announce) if answer.framing == "length" else None),
        ):
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.flush()
        time.sleep(answer.silence)
        sent = body if answer.cut is None else body[: answer.cut]
        if answer.framing == "chunked":
            self.wfile.write(f"{len(sent):x}\r\n".encode() + sent + b"\r\n")
            if answer.cut is None:
                self.wfile.write(b"0\r\n\r\n")
        else:
            self.wfile.write(sent)
        if answer.then is not None:
            answer.then()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "_WAITS_S", (0.0,) * (TRIES - 1))
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server() -> Iterator[Server]:
    has = Server()
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, has)) as http:  # type: ignore[arg-type]
        has.url = f"http://127.0.0.1:{http.server_port}/a/vit.pth"
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        yield has
        http.shutdown()
        thread.join()


@pytest.fixture
def gone() -> str:
    """An address at which nobody answers."""
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as http:
        port = http.server_port
    return f"http://127.0.0.1:{port}/vit.pth"


def part(folder: Path, name: str = "vit.pth") -> Path:
    return folder / ".download" / f"{name}.part"


def fails(url: str, message: str, folder: Path, *, sha256: str | None = None) -> None:
    """The download fails in one line that fits, and nothing has the file's name."""
    with pytest.raises(ValueError, match=message) as error:
        download(url, folder=folder, sha256=sha256)
    assert "\n" not in str(error.value)
    assert not (folder / "vit.pth").exists()


# From a server that keeps to the rules.


@pytest.mark.parametrize("sha256", [None, SHA256, SHA256.upper()])
def test_the_file_is_the_servers(
    server: Server, tmp_path: Path, sha256: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = download(server.url, folder=tmp_path / "new" / "folder", sha256=sha256)
    assert path == tmp_path / "new" / "folder" / "vit.pth"
    assert path.read_bytes() == CONTENT
    assert server.asked == [("/a/vit.pth", None, None)]
    assert not part(path.parent).exists()
    assert re.fullmatch(r"downloaded \S+/vit\.pth \(300\.0 kB, \d+ s\)\n", capsys.readouterr().err)


def test_the_usual_folder_is_one_an_address(server: Server, tmp_path: Path) -> None:
    one = download(server.url)
    server.content = b"another"
    two = download(server.url.replace("/a/", "/b/"))
    assert one.name == two.name == "vit.pth"
    assert one.parent.parent == two.parent.parent == tmp_path / "cache" / "weights"
    assert (one.read_bytes(), two.read_bytes()) == (CONTENT, b"another")


def test_what_is_here_needs_no_server(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = download(server.url)
    capsys.readouterr()
    server.content, server.answers = b"another", [Answer(status=404)]
    for sha256 in (None, SHA256):
        assert download(server.url, sha256=sha256) == path
    assert len(server.asked) == 1
    assert path.read_bytes() == CONTENT
    assert capsys.readouterr().err == ""


def test_a_file_put_there_by_hand_is_used_where_its_digest_is_known(gone: str, tmp_path: Path) -> None:
    (tmp_path / "vit.pth").write_bytes(CONTENT)
    assert download(gone, folder=tmp_path, sha256=SHA256).read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["vit.pth"]  # it may be read-only
    with pytest.raises(ValueError, match=f"vit.pth exists and was not downloaded from {gone}: move it"):
        download(gone, folder=tmp_path)
    with pytest.raises(ValueError, match=f"another content: sha256 expected {'0' * 64}, got {SHA256}; move"):
        download(gone, folder=tmp_path, sha256="0" * 64)
    assert (tmp_path / "vit.pth").read_bytes() == CONTENT


def test_a_file_of_another_address_is_not_taken_for_it(server: Server, tmp_path: Path) -> None:
    download(server.url, folder=tmp_path)
    with pytest.raises(ValueError, match="was not downloaded from"):
        download(server.url.replace("/a/", "/b/"), folder=tmp_path)
    assert len(server.asked) == 1


def test_a_file_damaged_since_is_downloaded_again(server: Server) -> None:
    path = download(server.url)
    path.write_bytes(CONTENT[:-1] + b"x")
    assert download(server.url).read_bytes() == CONTENT
    assert server.ranges_asked == [None, None]


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"other": 1}', b"\xff"])
def test_a_damaged_record_is_none(server: Server, tmp_path: Path, damage: bytes) -> None:
    server.answers = [Answer(cut=CUT), Answer(status=404)]
    fails(server.url, "404", tmp_path)
    (tmp_path / ".download" / "vit.pth.json").write_bytes(damage)
    server.answers = [Answer()]
    assert download(server.url, folder=tmp_path).read_bytes() == CONTENT
    assert server.ranges_asked[-1] is None


@pytest.mark.parametrize("framing", ["chunked", "close"])
def test_other_ways_to_say_where_the_file_ends(server: Server, framing: str) -> None:
    server.answers = [Answer(framing=framing)]
    assert download(server.url, sha256=SHA256).read_bytes() == CONTENT


def test_redirects_are_followed(server: Server) -> None:
    server.answers = [Answer(status=302, location="/elsewhere"), Answer(cut=CUT), Answer()]
    path = download(server.url)
    assert path.name == "vit.pth"
    assert path.read_bytes() == CONTENT
    assert [path for path, _, _ in server.asked] == ["/a/vit.pth", "/elsewhere", "/a/vit.pth"]


def test_an_empty_file_is_a_file(server: Server) -> None:
    server.content = b""
    assert download(server.url).read_bytes() == b""


# From a bad network.


@pytest.mark.parametrize(
    ("etag", "modified", "named"),
    [
        ('"one"', None, '"one"'),
        ('"one"', LAST_MODIFIED, '"one"'),
        ('W/"one"', LAST_MODIFIED, LAST_MODIFIED),
        (None, LAST_MODIFIED, LAST_MODIFIED),
    ],
)
@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_a_cut_transfer_goes_on(
    server: Server, etag: str | None, modified: str | None, named: str, framing: str
) -> None:
    server.etag, server.modified = etag, modified
    server.answers = [Answer(cut=CUT, framing=framing), Answer(framing=framing)]
    assert download(server.url).read_bytes() == CONTENT
    assert server.asked[1:] == [("/a/vit.pth", f"bytes={CUT}-", named)]


def test_every_try_that_brings_something_gives_further_tries(server: Server) -> None:
    server.answers = [Answer(cut=len(CONTENT) // 20)]  # always: many more cuts than tries in a row
    assert download(server.url).read_bytes() == CONTENT
    assert len(server.asked) == 20


def test_a_server_may_give_less_than_asked_for(server: Server) -> None:
    server.answers = [Answer(cut=CUT), Answer(at_most=50_000), Answer()]
    assert download(server.url).read_bytes() == CONTENT
    assert server.ranges_asked == [None, "bytes=100000-", "bytes=150000-"]


@pytest.mark.parametrize(("ranges", "etag"), [(False, '"one"'), (True, None), (True, 'W/"one"')])
def test_where_nothing_can_be_resumed_it_starts_over(server: Server, ranges: bool, etag: str | None) -> None:
    server.ranges, server.etag = ranges, etag
    server.answers = [Answer(cut=CUT), Answer()]
    assert download(server.url).read_bytes() == CONTENT
    assert server.ranges_asked[1] == (f"bytes={CUT}-" if etag == '"one"' else None)


def test_a_transfer_that_never_gets_further_ends(server: Server, tmp_path: Path) -> None:
    server.ranges, server.answers = False, [Answer(cut=CUT)]
    fails(server.url, r"peer closed connection.*; 100,000 bytes came, try again later", tmp_path)
    assert len(server.asked) == TRIES
    assert part(tmp_path).read_bytes() == CONTENT[:CUT]
    server.ranges, server.answers = True, [Answer()]
    assert download(server.url, folder=tmp_path).read_bytes() == CONTENT
    assert server.ranges_asked[-1] == f"bytes={CUT}-"


@pytest.mark.parametrize("if_range", [True, False])
@pytest.mark.parametrize("longer", [0, 1000])
def test_a_file_that_changes_between_two_tries_is_not_mixed(
    server: Server, if_range: bool, longer: int
) -> None:
    new = bytes(len(CONTENT) + longer)

    def change() -> None:
        server.content, server.etag = new, '"two"'

    server.if_range, server.answers = if_range, [Answer(cut=CUT, then=change), Answer()]
    assert download(server.url).read_bytes() == new
    assert server.ranges_asked == [None, f"bytes={CUT}-", *([] if if_range else [None])]


def test_a_file_that_became_shorter_starts_over(server: Server) -> None:
    def change() -> None:
        server.content = b"short"  # by a server that forgets to change the ETag

    server.answers = [Answer(cut=CUT, then=change), Answer()]
    assert download(server.url).read_bytes() == b"short"
    assert server.ranges_asked == [None, f"bytes={CUT}-", None]


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_status_that_passes_is_waited_for(server: Server, tmp_path: Path, status: int) -> None:
    server.answers = [Answer(status=status), Answer(status=status), Answer()]
    assert download(server.url).read_bytes() == CONTENT
    server.answers = [Answer(status=status)]
    fails(server.url, f"the server answers {status} [A-Z].*try again later", tmp_path)
    assert len(server.asked) == 3 + TRIES


@pytest.mark.parametrize("status", [204, 304, 401, 403, 404, 410])
def test_a_status_that_stays_ends_at_once(server: Server, tmp_path: Path, status: int) -> None:
    server.answers = [Answer(status=status)]
    fails(server.url, f"cannot be downloaded: the server answers {status} .*; check the address", tmp_path)
    assert len(server.asked) == 1


def test_a_silent_server_is_not_waited_for_forever(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_TIMEOUT_S", 0.1)
    monkeypatch.setattr(module, "_WAITS_S", (0.0,))
    server.answers = [Answer(silence=0.3)]
    fails(server.url, "timed out; 0 bytes came, try again later", tmp_path)
    assert len(server.asked) == 2
    server.answers = [Answer(silence=0.3), Answer()]
    assert download(server.url).read_bytes() == CONTENT


def test_who_cannot_be_reached_is_asked_once(gone: str, server: Server, tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_WAITS_S", (60.0,))
        fails(gone, "cannot be reached: .*; check the address and the network", tmp_path)
        fails("http://no-such-host.invalid/vit.pth", "cannot be reached", tmp_path)
        fails(server.url.replace("http:", "https:"), r"cannot be reached: .*(SSL|TLS)", tmp_path)
    assert time.monotonic() - began < 30


def test_addresses_that_lead_nowhere(server: Server, tmp_path: Path) -> None:
    server.answers = [Answer(status=302, location="/a/vit.pth")]
    fails(server.url, "cannot be downloaded: .*redirect", tmp_path)
    server.answers = [Answer(status=302, location="file:///etc/passwd")]
    fails(server.url, "cannot be downloaded: .*protocol", tmp_path)


# From a server that lies.


def test_too_few_bytes_are_noticed(server: Server, tmp_path: Path) -> None:
    server.answers = [Answer(announce=50)]
    fails(server.url, r"received 300000 bytes, expected 300050.*try again later", tmp_path, sha256=SHA256)
    assert server.ranges_asked[:3] == [None, "bytes=300000-", None]


def test_more_bytes_than_the_rest_are_noticed(server: Server, tmp_path: Path) -> None:
    server.answers = [Answer(cut=CUT), Answer(more=50)]
    fails(server.url, "expected the 300,000 bytes that were announced, and more came", tmp_path)
    assert not part(tmp_path).exists()


def test_too_small_a_length_is_noticed_by_the_digest(server: Server, tmp_path: Path) -> None:
    server.answers = [Answer(announce=-50)]
    came = hashlib.sha256(CONTENT[:-50]).hexdigest()
    fails(server.url, f"sha256 expected {SHA256}, got {came}", tmp_path, sha256=SHA256)
    assert not part(tmp_path).exists()


def test_a_wrong_file_is_not_kept(server: Server, tmp_path: Path) -> None:
    server.content = b"login page"
    came = hashlib.sha256(b"login page").hexdigest()
    fails(server.url, f"gave another file: sha256 expected {SHA256}, got {came}; ", tmp_path, sha256=SHA256)
    assert not part(tmp_path).exists()
    server.content = CONTENT
    assert download(server.url, folder=tmp_path, sha256=SHA256).read_bytes() == CONTENT


def test_a_wrong_part_is_noticed(server: Server, tmp_path: Path) -> None:
    server.answers = [Answer(cut=CUT), Answer(status=404)]
    fails(server.url, "404", tmp_path)
    part(tmp_path).write_bytes(bytes(CUT))
    server.answers = [Answer()]
    fails(server.url, "sha256 expected", tmp_path, sha256=SHA256)
    assert download(server.url, folder=tmp_path, sha256=SHA256).read_bytes() == CONTENT


def test_a_name_that_states_the_digest_is_checked(server: Server, tmp_path: Path) -> None:
    right, wrong = f"vit-{SHA256[:8]}.pth", "vit-0123abcd.pth.tar"
    assert download(server.url.replace("vit.pth", right)).read_bytes() == CONTENT
    with pytest.raises(ValueError, match=f"sha256 expected 0123abcd, got {SHA256}"):
        download(server.url.replace("vit.pth", wrong), folder=tmp_path)
    # A date looks like a digest: who states the whole digest is believed.
    path = download(server.url.replace("vit.pth", "vit-20240131.pth"), folder=tmp_path, sha256=SHA256)
    assert path.read_bytes() == CONTENT
    for no_digest in ("vit-1234567.pth", "vit-base_patch.pth", "vit_01234567.pth"):
        assert download(server.url.replace("vit.pth", no_digest)).read_bytes() == CONTENT


def test_a_compressed_answer_is_refused(server: Server, tmp_path: Path) -> None:
    server.answers = [Answer(encoding="gzip")]
    fails(server.url, "expected the file as it is, got it gzip-encoded", tmp_path)


def test_an_end_that_cannot_be_told_from_a_cut_is_refused(server: Server, tmp_path: Path) -> None:
    server.answers = [Answer(framing="close")]
    fails(server.url, "does not say how long the file is.*; give the file's sha256", tmp_path)
    server.answers = [Answer(framing="close", cut=CUT)]
    fails(server.url, "sha256 expected", tmp_path, sha256=SHA256)


# Local files, folders, addresses.


def test_a_local_file_is_copied(tmp_path: Path) -> None:
    source = tmp_path / "my weights.pth"
    source.write_bytes(CONTENT)
    path = download(source.as_uri(), sha256=SHA256)
    assert path.name == "my_weights.pth"
    assert path.read_bytes() == CONTENT
    source.write_bytes(b"new")
    assert download(source.as_uri()).read_bytes() == b"new"
    source.unlink()
    assert download(source.as_uri()).read_bytes() == b"new"
    with pytest.raises(ValueError, match="cannot be read: No such file or directory; check the path"):
        download(source.as_uri(), folder=tmp_path / "other")
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        download(tmp_path.as_uri())


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (
            "ftp://host/vit.pth",
            "expected an address with http://, https:// or file://, got 'ftp://host/vit.pth'",
        ),
        ("vit.pth", "expected an address"),
        ("", "expected an address"),
        ("https://host/", "names no file: expected https://HOST/PATH/NAME"),
        ("https://host/a/%2E%2E", "names no file"),
        ("https:///vit.pth", "cannot be downloaded: .*missing"),
        ("http://[::1/vit.pth", "is not an address"),
        ("http://host:port/vit.pth", "cannot be downloaded: Invalid port"),
        ("file://host/vit.pth", "is a file of another machine"),
    ],
)
def test_what_is_no_address_is_refused(url: str, message: str, tmp_path: Path) -> None:
    fails(url, message, tmp_path)


def test_a_name_stays_in_its_folder(server: Server, tmp_path: Path) -> None:
    for name, expected in (("..%2F..%2Fx.pth", "x.pth"), (".download", "download"), ("a%00%20b?c=d", "a__b")):
        path = download(server.url.replace("vit.pth", name), folder=tmp_path / "f")
        assert path == tmp_path / "f" / expected
        assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("sha256", ["", "abc", "0" * 63, "0" * 65, "g" * 64])
def test_what_is_no_digest_is_refused(sha256: str, gone: str, tmp_path: Path) -> None:
    fails(gone, f"sha256: expected 64 hexadecimal digits, got '{sha256}'", tmp_path, sha256=sha256)


def test_a_folder_that_cannot_be_written(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    fails(server.url, r"vit\.pth cannot be made \(.*file.*\): make room there, or choose", tmp_path / "file")
    fails(server.url, "cannot be made", Path("/proc/none"))
    assert server.asked == []


def test_a_full_disk_is_one_line_and_what_came_is_kept(server: Server, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (CUT, limits[1]))
    try:
        fails(server.url, r"vit\.pth cannot be made \(.*too large.*\): make room there", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert part(tmp_path).read_bytes() == CONTENT[:CUT]
    assert download(server.url, folder=tmp_path).read_bytes() == CONTENT
    assert server.ranges_asked == [None, f"bytes={CUT}-"]


# Several at once, and interrupted ones.


def test_two_at_once_download_once(server: Server, tmp_path: Path) -> None:
    server.answers = [Answer(silence=0.2)]
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: download(server.url, folder=tmp_path), range(4)))
    assert {path.read_bytes() for path in paths} == {CONTENT}
    assert len(server.asked) == 1


def test_an_interrupted_download_goes_on(
    server: Server, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    # What was started in the background may ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

    def interrupt() -> None:
        time.sleep(0.1)  # until the client has read what came
        os.kill(os.getpid(), signal.SIGINT)

    server.answers = [Answer(cut=CUT, then=interrupt)]
    with pytest.raises(KeyboardInterrupt):
        download(server.url, folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".download"]
    assert part(tmp_path).read_bytes() == CONTENT[:CUT]
    server.answers = [Answer()]
    assert download(server.url, folder=tmp_path, sha256=SHA256).read_bytes() == CONTENT
    assert server.ranges_asked[-1] == f"bytes={CUT}-"


def test_a_finished_part_needs_no_server(server: Server, tmp_path: Path) -> None:
    """Killed after the last byte, before the file has its name."""
    path = download(server.url, folder=tmp_path)
    path.rename(part(tmp_path))
    assert download(server.url, folder=tmp_path).read_bytes() == CONTENT
    assert len(server.asked) == 1


# The file alone, as its package would import torch, which takes longer than all of these tests.
PROGRAM = "import runpy, sys; runpy.run_path(sys.argv[1])['download'](sys.argv[2])"


def test_a_killed_process_gives_way_to_the_next(server: Server) -> None:
    hang, here = threading.Event(), threading.Event()

    def wait() -> None:
        here.set()
        hang.wait(20)

    server.answers = [Answer(cut=CUT, then=wait), Answer()]
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, module.__file__, server.url])
    try:
        assert here.wait(20)
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(download, server.url, sha256=SHA256)
            with pytest.raises(TimeoutError):
                other.result(0.3)
            assert len(server.asked) == 1  # the other one waits
            process.kill()
            assert other.result(20).read_bytes() == CONTENT
    finally:
        process.kill()
        process.wait()
        hang.set()
    assert server.ranges_asked == [None, f"bytes={CUT}-"]


def test_a_terminal_sees_a_bar(server: Server) -> None:
    server.answers = [Answer(cut=CUT, then=lambda: time.sleep(0.3)), Answer()]
    controller, terminal = pty.openpty()
    with open(controller, "rb", buffering=0) as screen:
        words = [sys.executable, "-c", PROGRAM, module.__file__, server.url]
        done = subprocess.run(words, stderr=terminal, check=False)
        os.close(terminal)
        seen = b""
        # Linux says end of a terminal's output with an error.
        with contextlib.suppress(OSError):
            while more := screen.read(65536):
                seen += more
    assert done.returncode == 0
    assert b"vit.pth" in seen
    assert b"100.0/300.0 kB" in seen
    assert seen.endswith(b" s)\r\n")
