"""Finds models on the Hugging Face hub. Each is downloaded once, to the cache of `transformers`.

`python train.py --model ViT-B/16` uses it. `HF_ENDPOINT`, `HF_HOME` and `HF_HUB_OFFLINE` work.
"""

import contextlib
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from support.errors import InputError, read_json

# OpenAI's own repositories.
OPENAI = {
    "ViT-B/32": "openai/clip-vit-base-patch32",
    "ViT-B/16": "openai/clip-vit-base-patch16",
    "ViT-L/14": "openai/clip-vit-large-patch14",
    "ViT-L/14@336px": "openai/clip-vit-large-patch14-336",
}
Files = Sequence[str]  # names that belong together; one of `a|b` is enough, the first is preferred
MODEL: Sequence[Files] = (
    ("config.json", "model.safetensors|model.safetensors.index.json|pytorch_model.bin"),
    ("open_clip_config.json", "open_clip_model.safetensors|open_clip_pytorch_model.bin"),
)
TOKENIZER: Sequence[Files] = (("tokenizer.json|merges.txt",),)
_BESIDE = ("tokenizer.json", "vocab.json", "merges.txt", "*processor_config.json")


def choose(present: Collection[str], formats: Sequence[Files] = MODEL) -> list[str]:
    """Returns the files of the first format that is complete in `present`, or an empty list."""
    for files in formats:
        found = [next((name for name in file.split("|") if name in present), "") for file in files]
        if all(found):
            return found
    return []


def download(name: str, formats: Sequence[Files] = MODEL) -> Path:
    """Returns the folder of a repository in the hub's cache, with the files of one of `formats`.

    Downloads what is not there. Raises InputError if it cannot.
    """
    import huggingface_hub as hub  # half a second that other runs do not need
    from huggingface_hub import constants, errors

    with contextlib.suppress(Exception):  # it is not in the cache
        folder = Path(hub.snapshot_download(name, allow_patterns=[], local_files_only=True))
        cached = {file.name for file in folder.iterdir() if file.exists()}
        files = choose(cached, formats)
        indices = [read_json(folder / file) for file in files if file.endswith(".index.json")]
        shards = {shard for index in indices for shard in index["weight_map"].values()}
        if files and choose(cached, TOKENIZER) and shards <= cached:
            return folder
    print(f"{name} is not whole in the cache: looking on {constants.ENDPOINT}", file=sys.stderr)
    try:
        files = choose(hub.list_repo_files(name), formats)
        if not files:
            raise FileNotFoundError("it has no model of transformers or open_clip")
        shards = ["model-*.safetensors"] if "model.safetensors.index.json" in files else []
        return Path(hub.snapshot_download(name, allow_patterns=[*files, *shards, *_BESIDE]))
    except Exception as error:  # the hub's client raises what its HTTP library raises
        parts = ", ".join(file.split("|")[0] for file in formats[0])
        advice = f"download its {parts} elsewhere, put it at --model FOLDER"
        if isinstance(error, errors.GatedRepoError):
            page = f"{constants.ENDPOINT}/{name}"
            advice = f"accept its conditions on {page}, and log in with `hf auth login`"
        elif isinstance(error, errors.RepositoryNotFoundError):
            advice = "correct it, or log in with `hf auth login`"
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        raise InputError(
            f"{name} is no file or folder here, and {constants.ENDPOINT} does not give it "
            f"({reason}): {advice}, or give a model in the cache, perhaps {' or '.join(OPENAI)}"
        ) from error
