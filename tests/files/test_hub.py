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
from helpers import TOKENIZER, archive, openai_state, small_model, write
from safetensors.numpy import save_file

import clip
from support import weights
from support.weights import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as a download needs, over the folders `server.repositories`, by name."""

    def do_HEAD(self) -> None:
        self.answer(b"", 404)

    def do_GET(self) -> None:
        self.answer(b"", 404)

    def answer(self, content: bytes, status: int) -> None:
        path = self.path.partition("?")[0].removeprefix("/api/models")
        name = "/".join(path.split("/")[1:3])
        folder = self.server.repositories.get(name)
        files = (
            {} if folder is None else {file.name: file.read_bytes() for file in folder.iterdir()}
        )
        asked = path.rpartition("/")[2]
        if folder is not None and self.path.startswith("/api"):
            siblings = [{"rfilename": file} for file in files]
            information = {
                "id": name,
                "sha": COMMIT,
                "siblings": siblings,
                "private": False,
                "tags": [],
            }
            if "/tree/" in path:
                information = [
                    {"type": "file", "path": file, "size": len(content), "oid": "0"}
                    for file, content in files.items()
                ]
            content, status = json.dumps(information).encode(), 200
        elif f"/{name}/resolve/" in path and asked in files:
            content, status = files[asked], 200
            if self.command == "GET":
                self.server.asked.append(asked)
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
from support import errors
from support import weights
for name in sys.argv[1:]:
    try:
        model, tokenizer = weights.load(name)
        print(model.config.activation, float(model.vision.class_embedding.sum()), tokenizer.encode("a dog").ids)
    except errors.InputError as error:
        print("refused:", error)
"""


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    """A hub without repositories."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repositories, server.asked = {}, []
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def loaded(tmp_path: Path, hub: ThreadingHTTPServer, *names: str, **environment: str) -> list[str]:
    """The lines of a process that loads models one after the other, with the hub's address and a cache of its own."""
    environment |= {
        "HF_ENDPOINT": address_of(hub),
        "HF_HOME": str(tmp_path / "hub"),
        "NO_PROXY": "127.0.0.1",
    }
    environment |= {"PYTHONPATH": str(Path(hub.__file__).parents[2])}
    arguments = [sys.executable, "-c", LOAD, *names]
    done = subprocess.run(
        arguments, env=os.environ | environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def address_of(hub: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{hub.server_port}"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A small model as `transformers` publishes it, and a file that is not needed."""
    folder = tmp_path / "repository"
    weights.save(folder, small_model(), TOKENIZER)
    (folder / "flax_model.msgpack").write_bytes(b"not needed")
    return folder


EXPECTED = f"quick_gelu {float(small_model().vision.class_embedding.sum())} {TOKENIZER.encode('a dog').ids}"


@pytest.mark.parametrize("kind", ["hugging face", "open_clip"])
def test_a_model_of_the_hub(
    kind: str, repository: Path, hub: ThreadingHTTPServer, tmp_path: Path
) -> None:
    """One download of the files that are needed, none the second time; then it works without the hub."""
    needed = {"tokenizer.json", "preprocessor_config.json", "config.json", "model.safetensors"}
    if kind == "open_clip":
        needed = {
            "tokenizer.json",
            "preprocessor_config.json",
            "open_clip_config.json",
            "open_clip_model.safetensors",
        }
        (repository / "config.json").unlink()
        config = small_model().config
        vision = {"image_size": config.image_size, "patch_size": config.patch_size}
        vision |= {"layers": config.vision.layers, "width": config.vision.width}
        text = {"context_length": config.context_length, "vocab_size": config.vocabulary_size}
        text |= {
            "layers": config.text.layers,
            "width": config.text.width,
            "heads": config.text.heads,
        }
        mlp_ratios = [tower.mlp_width / tower.width for tower in (config.vision, config.text)]
        vision["mlp_ratio"], text["mlp_ratio"] = mlp_ratios
        sizes = {
            "embed_dim": config.embedding_size,
            "quick_gelu": True,
            "vision_cfg": vision,
            "text_cfg": text,
        }
        (repository / "open_clip_config.json").write_text(json.dumps({"model_cfg": sizes}))
        state = clip.to_state_dict(small_model(), "openai")
        arrays = {name: np.array(array, order="C") for name, array in state.items()}
        save_file(arrays, repository / "open_clip_model.safetensors")
        (repository / "model.safetensors").unlink()
    hub.repositories["someone/clip"] = repository
    *found, refusal = loaded(tmp_path, hub, "someone/clip", "someone/clip", "someone/clop")
    assert found == [EXPECTED] * 2 and "not on the Hugging Face hub" in refusal
    assert sorted(hub.asked) == sorted(needed)
    hub.repositories.clear()
    assert loaded(tmp_path, hub, "someone/clip") == [EXPECTED]
    found, refusal = loaded(tmp_path, hub, "someone/clip", "someone/else", HF_HUB_OFFLINE="1")
    assert found == EXPECTED
    assert refusal.startswith(f"refused: someone/else cannot be downloaded from {address_of(hub)}")
    assert (
        "its config.json, model.safetensors elsewhere, put it at" in refusal
        and "ViT-B/32" in refusal
    )


def test_a_preset_is_a_model_of_the_hub(
    repository: Path, hub: ThreadingHTTPServer, tmp_path: Path
) -> None:
    hub.repositories["openai/clip-vit-base-patch32"] = repository
    assert loaded(tmp_path, hub, "ViT-B/32", "openai/clip-vit-base-patch32") == [EXPECTED] * 2


def test_the_hub_has_the_tokenizer_of_a_file_without_one(
    repository: Path, hub: ThreadingHTTPServer, tmp_path: Path
) -> None:
    """The weights beside it on the hub are not downloaded."""
    hub.repositories["openai/clip-vit-base-patch32"] = repository
    state = openai_state()
    sizes = small_model().config
    state["token_embedding.weight"] = np.ones((sizes.vocabulary_size, sizes.text.width), np.float16)
    path = write(tmp_path / "clip.pt", archive(state))
    (found,) = loaded(tmp_path, hub, str(path))
    assert found.endswith(str(TOKENIZER.encode("a dog").ids))
    assert sorted(hub.asked) == ["preprocessor_config.json", "tokenizer.json"]
