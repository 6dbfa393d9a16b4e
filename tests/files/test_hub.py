"""Models by their names on the Hugging Face hub, from a server on loopback."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from archives_by_hand import archive, write
from helpers import TOKENIZER, openai_state, shard, small_model
from safetensors.numpy import save_file

import clip
from support import weights

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROOT = Path(__file__).parents[2]


class Handler(BaseHTTPRequestHandler):
    """As much of the hub's interface as a download needs.

    The server has `repositories`, folders by name, the names of the `gated` ones, and the files
    that were `asked` for.
    """

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].removeprefix("/api/models")
        name = "/".join(path.split("/")[1:3])
        folder = self.server.repositories.get(name)
        paths = [] if folder is None else folder.iterdir()
        files = {file.name: file.read_bytes() for file in paths}
        asked = path.rpartition("/")[2]
        content, status, code = b"", 404, "RepoNotFound"
        if folder is not None and self.path.startswith("/api"):
            siblings = [{"rfilename": file} for file in files]
            answer: Any = {"id": name, "sha": COMMIT, "siblings": siblings}
            answer |= {"private": False, "tags": []}
            if "/tree/" in path:
                answer = [
                    {"type": "file", "path": file, "size": len(content), "oid": "0"}
                    for file, content in files.items()
                ]
            content, status = json.dumps(answer).encode(), 200
        elif f"/{name}/resolve/" in path and name in self.server.gated:
            status, code = 403, "GatedRepo"
        elif f"/{name}/resolve/" in path and asked in files:
            content, status = files[asked], 200
            if self.command == "GET":
                self.server.asked.append(asked)
        self.send_response(status)
        if status != 200:
            self.send_header("X-Error-Code", code)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    """A hub without repositories."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.repositories, server.gated, server.asked = {}, set(), []
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


LOAD = """
import sys
from support import errors, weights
for name in sys.argv[1:]:
    try:
        model, tokenizer = weights.load(name)
        total = float(model.vision.class_embedding.sum())
        print(model.config.activation, total, tokenizer.encode("a dog").ids)
    except errors.InputError as error:
        print("refused:", error)
"""
TOTAL = float(small_model().vision.class_embedding.sum())
EXPECTED = f"quick_gelu {TOTAL} {TOKENIZER.encode('a dog').ids}"


def load(tmp_path: Path, server: ThreadingHTTPServer, *names: str, **environment: str) -> list[str]:
    """Returns what a process prints that loads models from the server, with a cache of its own."""
    environment |= {"HF_ENDPOINT": address(server), "HF_HOME": str(tmp_path / "hub")}
    environment |= {"NO_PROXY": "127.0.0.1", "PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-c", LOAD, *names]
    done = subprocess.run(
        arguments, env=os.environ | environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def address(server: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_port}"


def beginning(server: ThreadingHTTPServer) -> str:
    """Returns what a refusal says first, after the name."""
    return f"is no file or folder here, and {address(server)} does not give it"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A small model as `transformers` publishes it, and files that are not needed."""
    folder = tmp_path / "repository"
    weights.save(folder, small_model(), TOKENIZER)
    for name in ("flax_model.msgpack", "pytorch_model.bin", "model-00001-of-00002.safetensors"):
        (folder / name).write_bytes(b"not needed")
    return folder


def publish_as_open_clip(repository: Path) -> None:
    (repository / "config.json").unlink()
    (repository / "model.safetensors").unlink()
    (repository / "pytorch_model.bin").unlink()
    config = small_model().config
    sizes = {
        "embed_dim": config.embedding_size,
        "quick_gelu": True,
        "vision_cfg": {"image_size": config.image_size, "patch_size": config.patch_size},
        "text_cfg": {"context_length": config.context_length, "heads": config.text.heads}
        | {"vocab_size": config.vocabulary_size},
    }
    for tower, section in (("vision", "vision_cfg"), ("text", "text_cfg")):
        size = getattr(config, tower)
        sizes[section] |= {"layers": size.layers, "width": size.width}
        sizes[section]["mlp_ratio"] = size.mlp_width / size.width
    (repository / "open_clip_config.json").write_text(json.dumps({"model_cfg": sizes}))
    state = clip.to_state_dict(small_model(), "openai")
    arrays = {name: np.array(array, order="C") for name, array in state.items()}
    save_file(arrays, repository / "open_clip_model.safetensors")


@pytest.mark.parametrize("kind", ["", "open_clip_"])
def test_a_model_of_the_hub(
    kind: str, repository: Path, server: ThreadingHTTPServer, tmp_path: Path
) -> None:
    """Downloads the files that are needed, once; then it works without the hub."""
    if kind == "open_clip_":
        publish_as_open_clip(repository)
    server.repositories["someone/clip"] = repository
    assert load(tmp_path, server, "someone/clip", "someone/clip") == [EXPECTED] * 2
    needed = [f"{kind}config.json", f"{kind}model.safetensors"]
    needed += ["preprocessor_config.json", "tokenizer.json"]
    assert sorted(server.asked) == sorted(needed)
    server.repositories.clear()
    found, refusal = load(tmp_path, server, "someone/clip", "someone/else", HF_HUB_OFFLINE="1")
    assert found == EXPECTED
    assert refusal.startswith(f"refused: someone/else {beginning(server)} (OfflineModeIsEnabled")
    assert "download its config.json, model.safetensors elsewhere, put it at --model" in refusal
    assert "or give a model in the cache, perhaps ViT-B/32" in refusal


@pytest.mark.parametrize("lost", ["tokenizer.json", "model-00002-of-00002.safetensors", "blob"])
def test_an_interrupted_download_is_completed(
    lost: str, repository: Path, server: ThreadingHTTPServer, tmp_path: Path
) -> None:
    """What it, or another program, left out is downloaded alone: a file, or what it links to."""
    (repository / "model-00001-of-00002.safetensors").unlink()
    shard(repository)
    server.repositories["someone/clip"] = repository
    assert load(tmp_path, server, "someone/clip") == [EXPECTED]
    assert "pytorch_model.bin" not in server.asked
    server.asked.clear()
    name = "model-00001-of-00002.safetensors" if lost == "blob" else lost
    (cached,) = (tmp_path / "hub").glob(f"**/snapshots/*/{name}")
    if lost == "blob":
        cached.resolve().unlink()
    else:
        cached.unlink()
    assert load(tmp_path, server, "someone/clip") == [EXPECTED]
    assert server.asked in ([], [name])
    assert cached.exists()
    server.repositories.clear()
    assert load(tmp_path, server, "someone/clip", HF_HUB_OFFLINE="1") == [EXPECTED]


def test_what_the_hub_does_not_give(
    repository: Path, server: ThreadingHTTPServer, tmp_path: Path
) -> None:
    """Each refusal is one line, with its reason and what to do."""
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "vocab.txt").write_text("not CLIP's")
    server.repositories |= {"someone/gated": repository, "someone/bert": tmp_path / "bert"}
    server.gated.add("someone/gated")
    names = ("someone/gone", "someone/gated", "someone/bert")
    gone, gated, other = load(tmp_path, server, *names)
    assert f"someone/gone {beginning(server)} (RepositoryNotFoundError" in gone
    assert "correct it, or log in with `hf auth login`, or give a model in the cache" in gone
    assert f"someone/gated {beginning(server)} (GatedRepoError" in gated
    assert f"accept its conditions on {address(server)}/someone/gated, and log in" in gated
    assert f"someone/bert {beginning(server)} (FileNotFoundError: it has no model" in other


def test_a_preset_is_a_model_of_the_hub(
    repository: Path, server: ThreadingHTTPServer, tmp_path: Path
) -> None:
    server.repositories["openai/clip-vit-base-patch32"] = repository
    names = ("ViT-B/32", "openai/clip-vit-base-patch32")
    assert load(tmp_path, server, *names) == [EXPECTED] * 2


def test_the_hub_has_the_tokenizer_of_a_file_without_one(
    repository: Path, server: ThreadingHTTPServer, tmp_path: Path
) -> None:
    """The weights beside it on the hub are not downloaded."""
    server.repositories["openai/clip-vit-base-patch32"] = repository
    path = write(tmp_path / "clip.pt", archive(openai_state()))
    (found,) = load(tmp_path, server, str(path))
    assert found.endswith(str(TOKENIZER.encode("a dog").ids))
    assert sorted(server.asked) == ["preprocessor_config.json", "tokenizer.json"]
