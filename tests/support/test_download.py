"""Downloads from a local server that breaks off, sends wrong bytes or refuses; the classes in OpenAI's notebook."""

import ast
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import shared
from helpers import SIZES, TOKENIZER, archive, openai_state, refused, small_model, vocabulary_file, write
from safetensors.numpy import save_file

import clip
from support import download, errors, files, opening, weights

CONTENT = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves `files` and records the `Range` of every request. The other attributes make it misbehave."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {"/file": CONTENT}
        self.ranges: list[str | None] = []
        self.breaks_off_after: list[int] = []  # bytes sent in each of the first responses
        self.knows_ranges = True
        self.chunked = False
        self.status = 200
        self.may_answer = threading.Event()
        self.may_answer.set()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/file"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        server, asked = self.server, self.headers["Range"]
        server.ranges.append(asked)
        server.may_answer.wait(30)
        self.close_connection = True
        content = server.files.get(self.path)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and server.knows_ranges else 0
        if server.status != 200 or content is None or start >= len(content):
            self.send_error(416 if content and start else server.status if content else 404)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        part = content[start:]
        sent = part[: server.breaks_off_after.pop(0) if server.breaks_off_after else None]
        if server.chunked:
            self.send_header("Transfer-Encoding", "chunked")
            end = b"0\r\n\r\n" if sent == part else b""
            sent = b"%x\r\n%s\r\n" % (len(sent), sent) + end if sent else end
        else:
            self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(sent)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.may_answer.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "file"


def partial(path: Path, content: bytes) -> Path:
    """Writes the part of a file that an earlier download left."""
    path.parent.mkdir()
    part = path.with_name("file.part")
    part.write_bytes(content)
    return part


def assert_downloads(server: Server, path: Path) -> None:
    assert download.download_once(server.address, SHA256, path) == path
    assert path.read_bytes() == CONTENT
    assert os.listdir(path.parent) == [path.name]


# ----------------------------------------------------------------------------------------------------------- downloads


def test_file_is_downloaded_once(server: Server, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_downloads(server, path)
    assert f"downloading {server.address}" in capsys.readouterr().err
    assert_downloads(server, path)
    assert server.ranges == [None]


def test_partial_download_is_continued(server: Server, path: Path) -> None:
    partial(path, CONTENT[:1000])
    assert_downloads(server, path)
    assert server.ranges == ["bytes=1000-"]


@pytest.mark.parametrize("chunked", [False, True])
def test_broken_connection_is_resumed(chunked: bool, server: Server, path: Path) -> None:
    server.breaks_off_after, server.chunked = [100_000, 0, 50_000], chunked
    assert_downloads(server, path)
    assert server.ranges == [None, "bytes=100000-", "bytes=100000-", "bytes=150000-"]


def test_server_that_always_breaks_off(server: Server, path: Path) -> None:
    server.breaks_off_after = [1000] * download.ATTEMPTS
    part = path.with_name("file.part")
    fetch = lambda: download.download_once(server.address, SHA256, path)  # noqa: E731
    refused(fetch, server.address, "5,000 bytes are kept in", part, "run again to continue", path)
    assert part.read_bytes() == CONTENT[:5000] and not path.exists()
    assert_downloads(server, path)
    assert server.ranges[-1] == "bytes=5000-"


def test_server_that_ignores_ranges(server: Server, path: Path) -> None:
    partial(path, CONTENT[:1000])
    server.knows_ranges, server.breaks_off_after = False, [70_000]
    assert_downloads(server, path)
    assert server.ranges == ["bytes=1000-", "bytes=70000-"]


def test_complete_file_that_was_not_renamed(server: Server, path: Path) -> None:
    """The server answers 416: no bytes are left to send."""
    partial(path, CONTENT)
    assert_downloads(server, path)
    assert server.ranges == ["bytes=300000-"]


@pytest.mark.parametrize("there", [b"", CONTENT[:1000], b"wrong", b"longer " + CONTENT])
def test_wrong_bytes_are_removed(there: bytes, server: Server, path: Path) -> None:
    part = partial(path, there)
    if there in CONTENT:
        server.files["/file"] = CONTENT[:-1] + b"?"
    found = hashlib.sha256(there + server.files["/file"][len(there) :]).hexdigest()
    refused(lambda: download.download_once(server.address, SHA256, path), server.address, found, SHA256, path)
    assert not part.exists() and not path.exists()
    server.files["/file"] = CONTENT
    assert_downloads(server, path)


def test_wrong_file_of_the_user_is_refused_and_kept(server: Server, path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"mine")
    found = hashlib.sha256(b"mine").hexdigest()
    refused(lambda: download.download_once(server.address, SHA256, path), server.address, found, SHA256, path)
    assert path.read_bytes() == b"mine" and not server.ranges


@pytest.mark.parametrize(("status", "there"), [(404, b""), (503, CONTENT[:1000])])
def test_server_that_refuses(status: int, there: bytes, server: Server, path: Path) -> None:
    part = partial(path, there)
    server.status, server.knows_ranges = status, False
    words = ["1,000 bytes are kept in", part] if there else []
    refused(
        lambda: download.download_once(server.address, SHA256, path),
        server.address,
        status,
        f"put it at {path}",
        *words,
    )
    assert len(server.ranges) == 1
    assert part.exists() == bool(there)


def test_no_server_answers(path: Path) -> None:
    with socket.socket() as bound:  # without listening
        bound.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{bound.getsockname()[1]}/file"
        refused(lambda: download.download_once(address, SHA256, path), address, "refused", f"put it at {path}")
    assert not path.with_name("file.part").exists()


def test_server_that_times_out(server: Server, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "TIMEOUT", 0.02)
    server.may_answer.clear()
    refused(
        lambda: download.download_once(server.address, SHA256, path), server.address, "5 times", f"put it at {path}"
    )
    assert len(server.ranges) == download.ATTEMPTS


def test_folder_that_cannot_be_used(server: Server, path: Path) -> None:
    path.parent.write_text("a file")
    with pytest.raises(errors.InputError, match=f"{path} cannot be used .*: set LIPSUM_CACHE to a writable folder"):
        download.download_once(server.address, SHA256, path)


def test_two_processes_download_once(
    server: Server, path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The server lets the first process wait until the second waits for the lock."""
    server.may_answer.clear()

    def observed(text: str, **how: Any) -> None:
        server.may_answer.set()
        print(text, **how)

    monkeypatch.setattr(files, "print", observed, raising=False)
    script = "import sys; from pathlib import Path; from support import download\n"
    script += "download.download_once(*sys.argv[1:3], Path(sys.argv[3]))"
    command = [sys.executable, "-W", "error", "-c", script, server.address, SHA256, str(path)]
    environment = os.environ | {"PYTHONPATH": str(Path(download.__file__).parents[1])}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as other:
        while not server.ranges:
            assert other.poll() is None, other.communicate()
            threading.Event().wait(0.01)
        assert_downloads(server, path)
        assert other.wait(30) == 0
        assert f"downloading {server.address}" in other.communicate()[1]
    assert f"waiting for another process that downloads {path}" in capsys.readouterr().err
    assert server.ranges == [None]


def test_preset_is_downloaded_and_then_works_offline(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {name: array.astype(np.float16) for name, array in openai_state().items()}
    state["token_embedding.weight"] = np.ones((49408, SIZES["text_width"]), np.float16)
    write(tmp_path / "ViT-B-32.pt", archive(state))
    vocabulary_file(tmp_path)
    for name in ("ViT-B-32.pt", download.VOCABULARY_FILE):
        server.files[f"/{name}"] = content = (tmp_path / name).read_bytes()
        address = server.address.replace("/file", f"/{name}")
        monkeypatch.setitem(download.FILES, name, download.Published(address, hashlib.sha256(content).hexdigest()))
    monkeypatch.setenv("LIPSUM_CACHE", str(tmp_path / "new" / "cache"))
    loaded, tokenizer = weights.load("ViT-B/32")
    assert (loaded.config.start_token, loaded.config.end_token) == (49406, 49407)
    assert tokenizer.token_to_id(clip.END_TEXT) == 49407
    server.status = 503
    weights.load("ViT-B/32")
    assert server.ranges == [None, None]


def test_addresses_contain_the_hashes() -> None:
    for name, (address, sha256) in download.FILES.items():
        assert address.startswith("https://") and address.endswith(f"/{name}")
        assert len(bytes.fromhex(sha256)) == 32
        assert not name.endswith(".pt") or address.split("/")[-2] == sha256


# ----------------------------------------------------------------------------------------- names of ImageNet's classes

CLASSES = [f"class {index}" for index in range(1000)]


def notebook(folder: Path, *sources: str | list[str]) -> Path:
    path = folder / download.NOTEBOOK
    cells = [{"cell_type": "code", "source": source, "outputs": []} for source in sources]
    path.write_text(json.dumps({"cells": cells}))
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LIPSUM_CACHE", str(tmp_path))
    return tmp_path


def test_published_classes_and_prompts(cache: Path) -> None:
    """The prompts that come with this project are the notebook's."""
    shutil.copy(shared(f"data/openai/{download.NOTEBOOK}"), cache)
    classes = download.openai_classes()
    assert (len(classes), len(set(classes))) == (1000, 998)  # two names occur twice
    assert [classes[index] for index in (0, 134, 517, 999)] == [
        "tench",
        "crane bird",
        "construction crane",
        "toilet paper",
    ]
    sources = ["".join(cell["source"]) for cell in json.loads((cache / download.NOTEBOOK).read_text())["cells"]]
    (assignment,) = [source for source in sources if source.startswith("imagenet_templates = ")]
    assert opening.read_templates("openai") == ast.literal_eval(ast.parse(assignment).body[0].value)


def test_openai_prompts_need_no_network() -> None:
    prompts = opening.read_templates("openai")
    assert len(set(prompts)) == 80 and all(prompt.count("{}") == 1 for prompt in prompts)


def test_classes_among_other_cells(cache: Path) -> None:
    lines = f"imagenet_classes = {CLASSES!r}\n\nprint(len(imagenet_classes))".splitlines(keepends=True)
    notebook(cache, "! pip install ftfy", "import no_such_module", "imagenet_templates = ['a {}']", lines)
    assert download.openai_classes() == CLASSES


def test_classes_are_downloaded(cache: Path) -> None:
    refused(download.openai_classes, download.FILES[download.NOTEBOOK].address, cache / download.NOTEBOOK)


@pytest.mark.parametrize(
    "classes",
    [
        "__import__('pathlib').Path({trace!r}).touch() or {classes!r}",
        "[__import__('pathlib').Path({trace!r}).touch(), *{classes!r}]",
        "(lambda: open({trace!r}, 'w').close())() or {classes!r}",
    ],
)
def test_notebook_is_never_executed(classes: str, cache: Path) -> None:
    trace = cache / "trace"
    source = "imagenet_classes = " + classes.format(trace=str(trace), classes=CLASSES)
    path = notebook(cache, source)
    refused(download.openai_classes, path)
    assert not trace.exists()
    exec(source, {})  # without the checks, the code is executed
    assert trace.exists()


@pytest.mark.parametrize("classes", [CLASSES[:-1], [7, *CLASSES[1:]], {}, None])
def test_wrong_classes_are_refused(classes: Any, cache: Path) -> None:
    path = notebook(cache, f"imagenet_classes = {classes!r}")
    refused(download.openai_classes, path, download.FILES[download.NOTEBOOK].address)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"cells": 3}', '{"cells": [{}]}', '{"cells": [{"source": 3}]}', "[" * 100_000]
)
def test_invalid_notebook_is_refused(content: str, cache: Path) -> None:
    (cache / download.NOTEBOOK).write_text(content)
    refused(download.openai_classes, cache / download.NOTEBOOK)


# ------------------------------------------------------------------------------------------------- the Hugging Face hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as a download needs, over the files of `server.repository`."""

    def do_HEAD(self) -> None:
        self.answer(b"", 404)

    def do_GET(self) -> None:
        self.answer(b"", 404)

    def answer(self, content: bytes, status: int) -> None:
        path = self.path.partition("?")[0]
        files = {file.name: file.read_bytes() for file in self.server.repository.iterdir()}
        siblings = [{"rfilename": name} for name in files]
        name = path.rpartition("/")[2]
        if path.startswith("/api/models/someone/clip"):
            information = {"id": "someone/clip", "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
            if "/tree/" in path:
                information = [
                    {"type": "file", "path": name, "size": len(content), "oid": "0"} for name, content in files.items()
                ]
            content, status = json.dumps(information).encode(), 200
        elif path.startswith("/someone/clip/resolve/") and name in files:
            content, status = files[name], 200
            if self.command == "GET":
                self.server.asked.append(name)
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None:
        pass


LOAD = """
import sys
from support import errors, weights
try:
    model, tokenizer = weights.load(sys.argv[1])
    print(model.config.activation, float(model.vision.class_embedding.sum()), tokenizer.encode("a dog").ids)
except errors.InputError as error:
    print("refused:", error)
"""


def loaded(tmp_path: Path, address: str, name: str = "someone/clip", **environment: str) -> str:
    """What a process of its own prints that loads a model from the hub at `address`."""
    environment |= {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hub"), "NO_PROXY": "127.0.0.1"}
    environment |= {"PYTHONPATH": str(Path(download.__file__).parents[1])}
    arguments = [sys.executable, "-c", LOAD, name]
    done = subprocess.run(arguments, env=os.environ | environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("kind", ["hugging face", "open_clip"])
def test_a_model_of_the_hub(kind: str, tmp_path: Path) -> None:
    """One download of the files that are needed, none the second time; then it works without the hub."""
    repository = tmp_path / "repository"
    weights.save(repository, small_model(), TOKENIZER)
    (repository / "flax_model.msgpack").write_bytes(b"not needed")
    if kind == "open_clip":
        (repository / "config.json").unlink()
        config = small_model().config
        vision = {"image_size": config.image_size, "patch_size": config.patch_size}
        vision |= {"layers": config.vision.layers, "width": config.vision.width}
        text = {"context_length": config.context_length, "vocab_size": config.vocabulary_size}
        text |= {"layers": config.text.layers, "width": config.text.width, "heads": config.text.heads}
        mlp_ratios = [tower.mlp_width / tower.width for tower in (config.vision, config.text)]
        vision["mlp_ratio"], text["mlp_ratio"] = mlp_ratios
        sizes = {"embed_dim": config.embedding_size, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
        (repository / "open_clip_config.json").write_text(json.dumps({"model_cfg": sizes}))
        state = clip.to_state_dict(small_model(), "openai")
        arrays = {name: np.array(array, order="C") for name, array in state.items()}
        save_file(arrays, repository / "open_clip_model.safetensors")
        (repository / "model.safetensors").unlink()
    expected = f"quick_gelu {float(small_model().vision.class_embedding.sum())} {TOKENIZER.encode('a dog').ids}"
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repository, server.asked = repository, []
    address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        assert loaded(tmp_path, address) == expected
        asked, server.asked = sorted(server.asked), []
        assert loaded(tmp_path, address) == expected
        assert server.asked == []
        assert "not on the Hugging Face hub" in loaded(tmp_path, address, "someone/clop")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    needed = {"tokenizer.json", "preprocessor_config.json"}
    needed |= (
        {"config.json", "model.safetensors"}
        if kind != "open_clip"
        else {"open_clip_config.json", "open_clip_model.safetensors"}
    )
    assert asked == sorted(needed)
    assert loaded(tmp_path, address) == expected  # the hub does not answer
    assert loaded(tmp_path, address, HF_HUB_OFFLINE="1") == expected
    refusal = loaded(tmp_path, address, "someone/else", HF_HUB_OFFLINE="1")
    assert refusal.startswith(f"refused: someone/else cannot be downloaded from {address}") and "ViT-B/32" in refusal
