"""Downloads OpenAI's published files into the cache, once: weights, vocabulary, and the names of ImageNet's classes.

Paper: Radford et al. 2021, https://arxiv.org/abs/2103.00020. `python train.py --model ViT-B/16` uses it. It works
offline if the cache contains the files; otherwise, the error says which file belongs where.
"""

import ast
import hashlib
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO, NamedTuple

from tqdm import tqdm

from clip import PRESETS
from support.errors import InputError, read_json
from support.files import cache_folder, locked


class Published(NamedTuple):
    """The address of a published file and the SHA-256 of its content."""

    address: str
    sha256: str


VOCABULARY_FILE = "bpe_simple_vocab_16e6.txt.gz"
NOTEBOOK = "Prompt_Engineering_for_ImageNet.ipynb"
_WEIGHTS = {
    "ViT-B-32.pt": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "ViT-B-16.pt": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "ViT-L-14.pt": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    "ViT-L-14-336px.pt": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
}
_REPOSITORY = {
    f"clip/{VOCABULARY_FILE}": "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a",
    f"notebooks/{NOTEBOOK}": "1788d6598fedcea5ba835dbab218ba2e3c2384871d334ae773ccae53f265eade",
}
FILES = {
    name: Published(f"https://openaipublic.azureedge.net/clip/models/{sha256}/{name}", sha256)
    for name, sha256 in _WEIGHTS.items()
} | {
    os.path.basename(path): Published(f"https://raw.githubusercontent.com/openai/CLIP/main/{path}", sha256)
    for path, sha256 in _REPOSITORY.items()
}

TIMEOUT = 20.0  # seconds without a byte
ATTEMPTS = 5
CHUNK = 2**20  # bytes


def published(name: str) -> Path:
    """Returns the path of a file of `FILES` in the cache; downloads it if it is missing, like `download_once`."""
    return download_once(*FILES[name], cache_folder() / name)


def download_once(address: str, sha256: str, path: Path) -> Path:
    """Returns `path`; downloads it from `address` if it is missing, resuming an interrupted download.

    If several processes ask for the same file, one downloads it. Raises InputError if the file cannot be downloaded
    or stored, or has another SHA-256.
    """
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with locked(path, waiting=f"download: waiting for another process that downloads {path}"):
                if not path.exists():
                    _download(address, sha256, path)
        # Always checked, at a second per gigabyte: the user may have put the file there, or the disk damaged it.
        found = _sha256(path)
    except OSError as error:
        raise InputError(f"{path} cannot be used ({error}): set LIPSUM_CACHE to a writable folder") from error
    if found != sha256:
        raise InputError(
            f"{path} is not the published file (sha256 {found}, not {sha256}): move it away, and the next run will "
            f"download {address}"
        )
    return path


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(address: str, sha256: str, path: Path) -> None:
    """Writes `path.part`, and renames it to `path` when it is complete on disk and has the right hash."""
    part = path.with_name(f"{path.name}.part")
    advice = f"download it elsewhere and put it at {path}"
    try:
        with open(part, "ab") as file:
            complete = any(_receive(address, file, path.name) for _ in range(ATTEMPTS))
            file.flush()
            os.fsync(file.fileno())
        problem = "" if complete else f"{address} broke off {ATTEMPTS} times"
    except urllib.error.URLError as error:
        problem = f"cannot download {address} ({error if isinstance(error, urllib.error.HTTPError) else error.reason})"
    if problem:
        if size := part.stat().st_size:
            advice = f"{size:,} bytes are kept in {part}, run again to continue, or {advice}"
        else:
            part.unlink()
        raise InputError(f"{problem}: {advice}")
    if (found := _sha256(part)) != sha256:
        part.unlink()
        raise InputError(f"{address} gave sha256 {found}, not {sha256}: it was removed; run again, or {advice}")
    os.replace(part, path)


def _receive(address: str, file: BinaryIO, name: str) -> bool:
    """Appends the missing bytes to `file`. Returns False if the connection breaks off before the end.

    Raises URLError if no server answers or the server answers with an error.
    """
    size = file.seek(0, os.SEEK_END)
    request = urllib.request.Request(address, headers={"Range": f"bytes={size}-"} if size else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and size:  # no bytes follow: the part is complete, if it has the right hash
            return True
        raise
    except urllib.error.URLError:
        raise
    except (OSError, HTTPException):
        return False
    with response:
        if response.status != 206:  # the server ignores ranges and sends the file from its first byte
            size = 0
            file.truncate(0)
        total = None if response.length is None else size + response.length
        with tqdm(desc=name, total=total, initial=size, unit="B", unit_scale=True, disable=None) as bar:
            if bar.disable:  # no terminal
                print(f"downloading {address}", file=sys.stderr)
            while True:
                try:
                    chunk = response.read1(CHUNK)  # unlike `read`, it keeps all bytes that arrive before a fault
                except (OSError, HTTPException):
                    return False
                if not chunk:
                    return total in (None, size)
                file.write(chunk)
                size += len(chunk)
                bar.update(len(chunk))


# The files that a model needs, in the formats of transformers and open_clip; one of `a|b` is enough.
_NEEDED = (
    ("config.json", "model.safetensors|model.safetensors.index.json|pytorch_model.bin"),
    ("open_clip_config.json", "open_clip_model.safetensors|open_clip_pytorch_model.bin"),
)
_BESIDE = ("tokenizer.json", "vocab.json", "merges.txt", "preprocessor_config.json", "processor_config.json")


def from_hub(name: str) -> Path:
    """Returns the folder of a model of the Hugging Face hub in the hub's cache. Downloads it if it is not there.

    `HF_ENDPOINT`, `HF_HOME` and `HF_HUB_OFFLINE` work as in `transformers`, which shares the cache. Raises InputError
    if the repository does not exist, is no CLIP, or cannot be downloaded.
    """
    import huggingface_hub as hub  # half a second that other runs do not need
    from huggingface_hub import constants, errors

    def chosen(there: Callable[[str], bool], *more: str) -> list[str]:
        """The files to load, of those that are there; none if something is missing."""
        for needed in _NEEDED:
            files = [next(filter(there, either.split("|")), "") for either in (*needed, *more)]
            if all(files):
                return files
        return []

    def is_cached(file: str) -> bool:
        return isinstance(hub.try_to_load_from_cache(name, file), str)

    try:
        files = chosen(is_cached, "tokenizer.json|merges.txt")
        if not files:
            print(f"{name} is no file or folder here: looking on {constants.ENDPOINT}", file=sys.stderr)
            files = chosen(set(hub.HfApi().list_repo_files(name)).__contains__)
            if not files:
                raise InputError(f"{name} on the Hugging Face hub is no CLIP of transformers or open_clip: choose one")
            shards = ["model-*.safetensors"] if files[1].endswith(".index.json") else []
            return Path(hub.snapshot_download(name, allow_patterns=[*files, *shards, *_BESIDE]))
    except InputError:
        raise
    except errors.RepositoryNotFoundError as error:
        advice = f"correct it, log in with `hf auth login` if it is private, or give one of {', '.join(PRESETS)}"
        raise InputError(f"{name} is no file or folder here, and not on the Hugging Face hub: {advice}") from error
    except Exception as error:  # the hub's client raises what its HTTP library raises
        files = chosen(is_cached)
        if not files:
            advice = (
                f"download it elsewhere, put it at a folder here and give that, or give one of {', '.join(PRESETS)}"
            )
            reason = str(error).strip().split("\n")[0]
            raise InputError(f"{name} cannot be downloaded from {constants.ENDPOINT} ({reason}): {advice}") from error
    return Path(hub.try_to_load_from_cache(name, files[0])).parent


def openai_classes() -> list[str]:
    """Returns OpenAI's 1,000 names of ImageNet's classes, by label.

    Reads what a cell of the notebook in the cache assigns to `imagenet_classes`, and executes nothing. Raises
    InputError if the notebook cannot be downloaded or does not contain this list.
    """
    path = cache_folder() / NOTEBOOK
    if not path.exists():  # an existing notebook need not match the hash: opening and saving it rewrites its outputs
        published(NOTEBOOK)
    classes: list[str] = []
    try:
        for cell in read_json(path)["cells"]:
            try:
                statements = ast.parse("".join(cell["source"])).body
            except SyntaxError:  # shell commands and prose
                continue
            for statement in statements:
                match statement:
                    case ast.Assign([ast.Name("imagenet_classes")], value):
                        classes = list(ast.literal_eval(value))
        if len(classes) != 1000 or not all(isinstance(text, str) for text in classes):
            raise ValueError(f"{len(classes)} classes, or one that is not a text")
    except Exception as error:  # a malformed notebook may raise anything
        address = FILES[NOTEBOOK].address
        problem = f"{path} does not assign 1,000 names to imagenet_classes ({error!r})"
        raise InputError(f"{problem}: put {address} there") from error
    return classes
