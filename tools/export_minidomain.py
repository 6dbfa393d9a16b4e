"""Writes the embedded benchmark as PNG files in DomainNet's layout.

python -m tools.export_minidomain DIR
"""

import itertools
import sys
from pathlib import Path
from typing import Annotated

import tyro
from PIL import Image

from support.disk import reported
from support.errors import InputError, exit_code
from support.layouts.minidomain import CLASSES, DOMAINS, SIZES, load_domain


def main(folder: Annotated[Path, tyro.conf.Positional]) -> None:
    """Write the embedded benchmark as PNG files in DomainNet's layout.

    Args:
        folder: New folder for DOMAIN/CLASS/FILE.png and DOMAIN_SPLIT.txt.
    """
    if folder.exists():
        raise InputError(f"{folder} exists: give a new folder")
    for domain, split in itertools.product(DOMAINS, SIZES):
        images, labels = load_domain(domain, split)
        lines = []
        with reported(folder):
            for index, (image, label) in enumerate(zip(images, labels, strict=True)):
                path = f"{domain}/{CLASSES[label]}/{split}_{index:06d}.png"
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(folder / path)
                lines.append(f"{path} {label}\n")
            (folder / f"{domain}_{split}.txt").write_text("".join(lines))


if __name__ == "__main__":
    sys.exit(exit_code(lambda: tyro.cli(main, prog="python -m tools.export_minidomain")))
