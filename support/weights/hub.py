"""Finds models on the Hugging Face hub: downloads each once, to the cache that `transformers` and open_clip share.

Paper: Radford et al. 2021, https://arxiv.org/abs/2103.00020. `python train.py --model ViT-B/16` uses it. `HF_ENDPOINT`,
`HF_HOME` and `HF_HUB_OFFLINE` work as in `transformers`.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from support.errors import InputError

# OpenAI's own repositories.
OPENAI = {
    "ViT-B/32": "openai/clip-vit-base-patch32",
    "ViT-B/16": "openai/clip-vit-base-patch16",
    "ViT-L/14": "openai/clip-vit-large-patch14",
    "ViT-L/14@336px": "openai/clip-vit-large-patch14-336",
}
Needed = Sequence[str]  # file names that belong together; one of `a|b` is enough
MODEL: tuple[Needed, ...] = (
    ("config.json", "model.safetensors|model.safetensors.index.json|pytorch_model.bin"),
    ("open_clip_config.json", "open_clip_model.safetensors|open_clip_pytorch_model.bin"),
)
TOKENIZER: tuple[Needed, ...] = (("tokenizer.json",),)
_BESIDE = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
)


def from_hub(name: str, formats: Sequence[Needed] = MODEL) -> Path:
    """Returns the folder in the hub's cache with the files of one of `formats`. Downloads them if they are not there.

    Raises InputError if the repository does not exist, lacks such files, or cannot be downloaded.
    """
    import huggingface_hub as hub  # half a second that other runs do not need
    from huggingface_hub import constants, errors

    def chosen(there: Callable[[str], bool], *more: str) -> list[str]:
        """The files to load, of those that are there; none if something is missing."""
        for needed in formats:
            files = [next(filter(there, either.split("|")), "") for either in (*needed, *more)]
            if all(files):
                return files
        return []

    def is_cached(file: str) -> bool:
        return isinstance(hub.try_to_load_from_cache(name, file), str)

    try:
        files = chosen(is_cached, "tokenizer.json|merges.txt")
        if not files:
            print(f"{name} is not in the cache: looking on {constants.ENDPOINT}", file=sys.stderr)
            files = chosen(set(hub.HfApi().list_repo_files(name)).__contains__)
            if not files:
                raise InputError(
                    f"{name} on the Hugging Face hub is no CLIP of transformers or open_clip: choose one"
                )
            shards = ["model-*.safetensors"] if files[-1].endswith(".index.json") else []
            return Path(hub.snapshot_download(name, allow_patterns=[*files, *shards, *_BESIDE]))
    except InputError:
        raise
    except errors.RepositoryNotFoundError as error:
        advice = f"correct it, log in with `hf auth login` if it is private, or give one of {', '.join(OPENAI)}"
        raise InputError(
            f"{name} is no file or folder here, and not on the Hugging Face hub: {advice}"
        ) from error
    except Exception as error:  # the hub's client raises what its HTTP library raises
        files = chosen(is_cached)
        if not files:
            wanted = ", ".join(either.split("|")[0] for either in formats[0])
            reason = str(error).strip().split("\n")[0]
            raise InputError(
                f"{name} cannot be downloaded from {constants.ENDPOINT} ({reason}): download its {wanted} elsewhere, "
                f"put it at --model FOLDER, or give a model in the cache, perhaps {' or '.join(OPENAI)}"
            ) from error
    return Path(str(hub.try_to_load_from_cache(name, files[0]))).parent
