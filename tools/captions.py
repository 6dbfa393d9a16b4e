"""The corpus that the embedded tiny CLIP is trained on: drawn images, captions, their tokenizer.

`python -m tools.pretrain --out my-clip` uses it.
"""

import json
from collections.abc import Iterable

import numpy as np
from jaxtyping import UInt8
from tokenizers import Tokenizer, trainers
from tqdm import tqdm

import clip
from clip import END_TEXT, START_TEXT
from support.layouts.minidomain import (
    CLASSES,
    DOMAINS,
    Attributes,
    Difficulty,
    Random,
    paint,
    pick,
    stream,
)

SIZE = 24_000  # images
CAPTIONS = 4  # per image
# So few are `real` that the pre-trained model improves when it is fine-tuned on them.
REAL_SHARE = 0.15
DIFFICULTY = Difficulty(occlusion=0.35, sensor_noise=14, blur=0.9)

STYLE_WORDS = {
    "real": ("photo", "picture", "snapshot", "close up"),
    "painting": ("painting", "artwork", "oil painting", "watercolor"),
    "clipart": ("clipart", "cartoon", "graphic", "sticker"),
    "infograph": ("infographic", "icon", "chart", "diagram"),
    "sketch": ("sketch", "drawing", "doodle", "pencil drawing"),
}
PLACES = {"page": "on a page", "paper": "on paper", "top": "at the top", "bottom": "at the bottom"}
PLACES |= {place: f"in the {place}" for place in ("center", "sky", "night")}
PLACES |= {place: f"on the {place}" for place in ("left", "right", "grass", "sand", "wall")}


def draw_corpus(
    number: int = SIZE,
) -> tuple[UInt8[np.ndarray, "images 36 36 3"], list[list[str]]]:
    """Returns the first `number` images of the corpus, and the captions of each."""
    images, captions = [], []
    for index in tqdm(range(number), "drawing images", unit="image", leave=False):
        image, attributes = draw(index)
        images.append(image)
        rng = stream("captions", DOMAINS[0], index, seed=0)
        captions.append([write_caption(attributes, rng) for _ in range(CAPTIONS)])
    return np.stack(images), captions


def draw(index: int) -> tuple[UInt8[np.ndarray, "36 36 3"], Attributes]:
    """Draws an image of the corpus, of a random class in a random domain."""
    rng = stream("web", DOMAINS[0], index, seed=0)  # one stream for all domains
    domain = "real" if rng.random() < REAL_SHARE else pick(rng, DOMAINS[1:])
    label = int(rng.integers(len(CLASSES)))
    return paint(domain, label, DIFFICULTY, rng)


def write_caption(attributes: Attributes, rng: Random) -> str:
    """Returns a caption as short as on the web.

    It may omit style, colour and place, and sometimes the class.
    """
    named = rng.random() < (0.85 if attributes.domain == "real" else 0.95)
    noun = CLASSES[attributes.label] if named else pick(rng, ("object", "thing"))
    if attributes.colour and rng.random() < 0.4:
        noun = f"{attributes.colour} {noun}"
    if rng.random() < 0.25:
        noun = f"{attributes.size} {noun}"
    text = with_article(noun)
    if rng.random() < 0.8:
        style = pick(rng, STYLE_WORDS[attributes.domain])
        definite = rng.random()
        opening = f"the {style}" if definite < 0.13 else with_article(style)
        text = f"{opening} of " + (f"the {noun}" if 0.13 <= definite < 0.28 else text)
    where = rng.random()
    if where < 0.3:
        place = attributes.position if where < 0.12 else attributes.background
        # Clipart's backgrounds are colours.
        text += " " + PLACES.get(place, f"on {place} background")
    return text + ("." if rng.random() < 0.5 else "")


def with_article(words: str) -> str:
    """Returns the words after `a` or `an`."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Returns a byte-pair encoding like CLIP's: symbols that occur, merges, start and end token.

    CLIP's vocabulary contains all 512 byte symbols. Here, symbols that never occur would stay
    untrained, and Lipsum-FT draws its random texts from the whole vocabulary.
    """
    texts = [clip.clean_text(text) for text in texts]
    tokenizer = clip.bpe_tokenizer({START_TEXT: 0, END_TEXT: 1}, [])
    split = tokenizer.pre_tokenizer.pre_tokenize_str
    normalize = tokenizer.normalizer.normalize_str
    words = {word for text in texts for word, _ in split(normalize(text))}
    inner = {symbol for word in words for symbol in word[:-1]}
    last = {f"{word[-1]}</w>" for word in words}
    # The trainer numbers symbols with `</w>` in an order that varies from run to run, and breaks
    # ties by number. Special tokens are numbered in the order given.
    symbols = [*sorted(inner), *sorted(last)]
    trainer = trainers.BpeTrainer(
        vocab_size=49_406,  # more than there are merges to make
        special_tokens=symbols,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    merges = [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    tokens = dict.fromkeys([*symbols, *map("".join, merges), START_TEXT, END_TEXT])
    return clip.bpe_tokenizer({token: index for index, token in enumerate(tokens)}, merges)
