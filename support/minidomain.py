"""The embedded benchmark: 20 classes drawn in DomainNet's five domains, small enough for experiments on a CPU.

It takes DomainNet's place in Lipsum-FT (https://openreview.net/forum?id=2JF8mJRJ7M): fine-tune on `real`, test on all
five. `web` is the captioned corpus that the embedded tiny CLIP was trained on. Nothing is downloaded: an image is drawn
from (split, domain, index, seed), and what was drawn is kept in the cache folder.

    python -m support.minidomain --export DIR --web     # PNG files in DomainNet's layout, and the captioned corpus
"""

import functools
import hashlib
import io
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import tyro
from jaxtyping import Float, Int32, UInt8
from PIL import Image, ImageDraw, ImageFilter

from support.errors import InputError, exit_code
from support.files import cache_folder, locked, write_whole

RESOLUTION = 36
SCALE = 3  # images are drawn this much larger, then reduced: Pillow's polygons and lines are not anti-aliased
CANVAS = SCALE * RESOLUTION
SIZES = {"train": 4000, "val": 500, "test": 1000}  # images per domain
WEB_SIZE = 24_000
WEB_REAL_SHARE = 0.15  # few enough that fine-tuning on `real` has something to teach

COLOURS = {
    "red": (205, 45, 45),
    "orange": (235, 135, 35),
    "yellow": (235, 210, 55),
    "green": (60, 160, 70),
    "blue": (55, 95, 200),
    "purple": (130, 65, 165),
    "pink": (240, 140, 180),
    "brown": (130, 85, 50),
}
BACKGROUNDS = {
    "grass": (85, 130, 60),
    "sand": (200, 175, 125),
    "sky": (130, 175, 220),
    "wall": (165, 160, 155),
    "night": (40, 42, 62),
}
EXTENTS = {"small": (0.60, 0.68), "medium": (0.74, 0.82), "large": (0.88, 0.96)}  # radius, in halves of the canvas
POSITIONS = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1), "center": (0, 0)}

Random = np.random.Generator
Number = int | float
Points = Float[np.ndarray, "_ 2"]
Colour = Float[np.ndarray, "3"]
Pixels = UInt8[np.ndarray, "36 36 3"]


# --------------------------------------------------------------------------------------------------------------- shapes


class Part(NamedTuple):
    """A filled polygon in [-1, 1]^2, y pointing down."""

    outline: Points
    shade: Number = 1  # below 1 darker, above 1 nearer to white
    accent: bool = False  # filled with the subject's second colour


Shape = Iterator[Part]  # back to front


def accent(outline: Points, shade: Number) -> Part:
    return Part(outline, shade, accent=True)


def polygon(*coordinates: Number) -> Points:
    return np.array(coordinates, float).reshape(-1, 2)


def box(left: Number, top: Number, right: Number, bottom: Number) -> Points:
    return polygon(left, top, right, top, right, bottom, left, bottom)


def ellipse(x: Number, y: Number, rx: float, ry: float, start: Number = 0, stop: Number = 2, number: int = 0) -> Points:
    """Points on an ellipse from angle `start` to `stop`, in units of pi, clockwise from the right."""
    number = number or round(6 + 9 * rx * abs(stop - start))
    angles = math.pi * np.linspace(start, stop, number, endpoint=stop - start < 2)
    return np.stack([x + rx * np.cos(angles), y + ry * np.sin(angles)], axis=1)


def band(line: Points, half_width: float) -> Points:
    """The outline of a line drawn with a broad pen."""
    along = np.gradient(line, axis=0)
    across = np.stack([-along[:, 1], along[:, 0]], axis=1)
    across *= half_width / np.maximum(np.linalg.norm(across, axis=1, keepdims=True), 1e-9)
    return np.concatenate([line + across, (line - across)[::-1]])


def union(x: Number, y: Number, ellipses: Sequence[tuple[Number, Number, float, float]], number: int = 48) -> Points:
    """The outline around ellipses (x, y, rx, ry) as seen from the point (x, y), which must lie in one of them."""
    angles = 2 * math.pi * np.arange(number) / number
    rays = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    reach = np.zeros(number)
    for centre_x, centre_y, *radii in ellipses:
        ray, offset = rays / radii, np.array([x - centre_x, y - centre_y]) / radii
        a, b, c = (ray**2).sum(1), ray @ offset, offset @ offset - 1  # a t^2 + 2 b t + c = 0 on the ellipse
        root = b**2 - a * c
        reach = np.maximum(reach, np.where(root > 0, (-b + np.sqrt(np.maximum(root, 0))) / a, 0))
    return [x, y] + reach[:, None] * rays


def star(rng: Random) -> Shape:
    points = (5, 5, 5, 6)[rng.integers(4)]
    radius = np.where(np.arange(2 * points) % 2 == 0, 1, rng.uniform(0.36, 0.5))
    angle = np.arange(2 * points) * math.pi / points - math.pi / 2
    yield Part(np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1))


def heart(rng: Random) -> Shape:
    t = np.linspace(0, 2 * math.pi, 30, endpoint=False)
    height = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    yield Part(np.stack([16 / 17 * np.sin(t) ** 3, -(height + 1) / 16 * rng.uniform(0.85, 1.05)], axis=1))


def house(rng: Random) -> Shape:
    eaves = rng.uniform(-0.25, 0.05)
    if rng.random() < 0.4:  # a chimney
        yield Part(box(0.4, -0.9, 0.65, -0.3), 0.7)
    yield Part(box(-0.7, eaves, 0.7, 0.9))
    yield accent(polygon(-0.95, eaves, 0, -0.95, 0.95, eaves), 0.6)
    if rng.random() < 0.7:  # a door
        yield accent(box(-0.15, 0.3, 0.2, 0.9), 0.45)
    if rng.random() < 0.7:  # a window
        yield accent(box(0.32, 0.2, 0.58, 0.5), 1.5)


def tree(rng: Random) -> Shape:
    yield accent(box(-0.15, 0.1, 0.15, 1), 0.5)
    if rng.random() < 0.5:  # a conifer
        yield Part(polygon(-0.75, 0.55, 0, -0.35, 0.75, 0.55), 0.9)
        yield Part(polygon(-0.55, 0, 0, -0.95, 0.55, 0), 1.1)
    else:
        lobes = [(x, y, 0.36, 0.35) for x, y in ((-0.4, 0), (0.4, 0), (-0.25, -0.5), (0.25, -0.5))]
        yield Part(union(0, -0.2, [(0, -0.2, 0.4, 0.5), *lobes]))


def fish(rng: Random) -> Shape:
    depth = rng.uniform(0.36, 0.52)
    yield Part(polygon(0.4, 0, 1, -0.55, 0.85, 0, 1, 0.55), 0.8)
    yield Part(ellipse(-0.15, 0, 0.8, depth))
    yield accent(ellipse(-0.58, -0.12, 0.1, 0.1), 0.2)
    if rng.random() < 0.5:  # a fin
        yield Part(polygon(-0.2, -depth * 0.95, 0.2, -depth - 0.28, 0.25, -depth * 0.85), 0.8)


def car(rng: Random) -> Shape:
    roof = rng.uniform(-0.55, -0.38)
    yield Part(polygon(-0.58, 0, -0.38, roof, 0.36, roof, 0.64, 0), 0.85)
    yield accent(polygon(-0.43, -0.03, -0.3, roof + 0.12, 0.29, roof + 0.12, 0.46, -0.03), 1.6)
    yield Part(box(-1, -0.02, 1, 0.45))
    yield accent(ellipse(-0.55, 0.47, 0.26, 0.26), 0.25)
    yield accent(ellipse(0.55, 0.47, 0.26, 0.26), 0.25)


def cup(rng: Random) -> Shape:
    foot = rng.uniform(0.5, 0.68)
    yield Part(band(ellipse(0.52, -0.05, 0.4, 0.4, -0.41, 0.48), 0.1), 0.8)
    yield Part(polygon(-0.68, -0.65, 0.62, -0.65, foot * 0.8, 0.75, -foot * 0.85, 0.75))
    yield accent(ellipse(-0.03, -0.65, 0.65, 0.17), 0.5)


def key(rng: Random) -> Shape:
    yield Part(band(ellipse(-0.58, 0, 0.31, 0.33, 0, 1.99), 0.12))
    yield Part(box(-0.28, -0.11, 0.95, 0.11))
    yield Part(box(0.74, 0.1, 0.94, 0.5))
    if rng.random() < 0.8:
        yield Part(box(0.4, 0.1, 0.58, 0.4))


def umbrella(rng: Random) -> Shape:
    handle = np.concatenate([polygon(0, -0.1, 0, 0.3, 0, 0.7), ellipse(0.16, 0.75, 0.16, 0.2, 1, 0)])
    yield accent(band(handle, 0.065), 0.4)
    scallops = [ellipse(x, 0, 0.245, -0.16, 0, 1, number=7) for x in (0.735, 0.245, -0.245, -0.735)]
    yield Part(np.concatenate([ellipse(0, 0, 0.98, 0.9, 1, 2), *scallops]))
    if rng.random() < 0.5:
        yield Part(polygon(0, -0.9, 0.25, -0.02, -0.25, -0.02), 0.7)


def moon(rng: Random) -> Shape:
    # A disc less a smaller one: the horns are at the angle `horn`, the inner edge meets the axis at x = -inner.
    horn, inner, shift = rng.uniform(0.2, 0.32), rng.uniform(0.0, 0.3), 0.2
    x, y = 0.95 * math.cos(horn * math.pi), 0.95 * math.sin(horn * math.pi)
    centre = (0.95**2 - inner**2) / (2 * inner + 2 * x)
    angle = math.atan2(y, x - centre) / math.pi
    inner_edge = ellipse(centre + shift, 0, centre + inner, centre + inner, 2 - angle, angle)
    yield Part(np.concatenate([ellipse(shift, 0, 0.95, 0.95, horn, 2 - horn), inner_edge]))


def cloud(rng: Random) -> Shape:
    puffs = [(-0.58, 0.1, 0.36, 0.34), (-0.14, -0.15, 0.32, rng.uniform(0.38, 0.5)), (0.3, -0.05, 0.29, 0.38)]
    outline = union(0, 0.15, [*puffs, (0.62, 0.16, 0.34, 0.29), (0, 0.2, 0.6, 0.3)])
    yield Part(np.minimum(outline, [1, 0.45]))  # flat below


def mushroom(rng: Random) -> Shape:
    yield accent(polygon(-0.24, 0, 0.24, 0, 0.32, 0.95, -0.32, 0.95), 1.5)
    dome = ellipse(0, 0.1, 0.95, rng.uniform(0.8, 1.05), 1, 2)
    yield Part(np.concatenate([dome, polygon(0.6, 0.22, -0.6, 0.22)]))
    for x, y in ((-0.4, -0.2), (0.15, -0.5), (0.45, -0.1)):
        if rng.random() < 0.6:
            yield accent(ellipse(x, y, 0.15, 0.13), 1.6)


def rocket(rng: Random) -> Shape:
    if rng.random() < 0.5:  # a flame
        yield accent(polygon(-0.2, 0.7, 0, 1.1, 0.2, 0.7), 1.4)
    yield accent(polygon(-0.3, 0.3, -0.78, 0.9, -0.3, 0.75), 0.7)
    yield accent(polygon(0.3, 0.3, 0.78, 0.9, 0.3, 0.75), 0.7)
    yield Part(polygon(0, -1, 0.28, -0.55, 0.34, 0, 0.28, 0.75, -0.28, 0.75, -0.34, 0, -0.28, -0.55))
    yield accent(ellipse(0, -0.25, 0.16, 0.16), 1.6)


def crown(rng: Random) -> Shape:
    tip = rng.uniform(-0.75, -0.5)
    yield Part(polygon(-0.85, 0.65, -0.95, tip, -0.45, 0, 0, tip - 0.15, 0.45, 0, 0.95, tip, 0.85, 0.65))
    yield accent(box(-0.85, 0.45, 0.85, 0.7), 0.7)
    if rng.random() < 0.6:
        for x, y in ((-0.95, tip), (0, tip - 0.15), (0.95, tip)):
            yield accent(ellipse(x, y, 0.1, 0.1), 1.4)


def bell(rng: Random) -> Shape:
    flare = rng.uniform(0.82, 0.95)
    yield accent(ellipse(0, 0.72, 0.2, 0.2), 0.5)
    right = polygon(flare, 0.68, 0.62, 0.4, 0.52, -0.2, 0.35, -0.65)
    yield Part(np.concatenate([right, polygon(0, -0.85), right[::-1] * [-1, 1]]))
    yield accent(ellipse(0, -0.88, 0.12, 0.12), 0.8)


def boat(rng: Random) -> Shape:
    yield Part(polygon(-0.95, 0.4, 0.95, 0.4, 0.6, 0.85, -0.6, 0.85))
    yield accent(box(-0.06, -0.95, 0.04, 0.4), 0.4)
    yield accent(polygon(0.1, -0.9, 0.75, 0.3, 0.1, 0.3), 1.5)
    if rng.random() < 0.6:  # a jib
        yield accent(polygon(-0.12, -0.7, -0.6, 0.3, -0.12, 0.3), 1.3)


def flower(rng: Random) -> Shape:
    yield accent(box(-0.06, 0.1, 0.06, 1), 0.5)
    for x, y in ellipse(0, -0.3, 0.42, 0.42, number=int(rng.integers(5, 8))):
        yield Part(ellipse(x, y, 0.26, 0.26))
    yield accent(ellipse(0, -0.3, 0.23, 0.23), 1.5)


def apple(rng: Random) -> Shape:
    width = rng.uniform(0.5, 0.58)
    yield accent(band(polygon(0, -0.35, 0.04, -0.7, 0.12, -0.95), 0.06), 0.4)
    yield Part(union(0, 0.15, [(-0.28, 0.15, width, 0.68), (0.28, 0.15, width, 0.68)]))
    yield accent(polygon(0.1, -0.6, 0.4, -0.95, 0.6, -0.75, 0.35, -0.58), 0.8)


def chair(rng: Random) -> Shape:
    if rng.random() < 0.5:  # from the side
        yield Part(box(-0.6, -0.95, -0.42, 0.95))
        yield Part(box(0.42, 0.15, 0.6, 0.95), 0.8)
        yield Part(box(-0.6, 0, 0.65, 0.22))
        yield Part(box(-0.6, -0.95, -0.3, 0), 0.85)
    else:
        yield Part(box(-0.55, -0.95, 0.55, -0.1), 0.8)
        yield Part(box(-0.65, 0, 0.65, 0.25))
        yield Part(box(-0.6, 0.25, -0.42, 0.98), 0.7)
        yield Part(box(0.42, 0.25, 0.6, 0.98), 0.7)


def bottle(rng: Random) -> Shape:
    width = rng.uniform(0.3, 0.42)
    glass = polygon(
        -0.13, -0.8, 0.13, -0.8, 0.14, -0.4, width, -0.1, width, 0.95, -width, 0.95, -width, -0.1, -0.14, -0.4
    )
    yield Part(glass)
    yield accent(box(-0.17, -1, 0.17, -0.8), 0.5)
    if rng.random() < 0.7:  # a label
        yield accent(box(-width, 0.2, width, 0.6), 1.5)


shapes = [star, heart, house, tree, fish, car, cup, key, umbrella, moon]
shapes += [cloud, mushroom, rocket, crown, bell, boat, flower, apple, chair, bottle]
SHAPES: dict[str, Callable[[Random], Shape]] = {shape.__name__: shape for shape in shapes}
CLASSES = tuple(SHAPES)  # in label order


# --------------------------------------------------------------------------------------------------------------- styles


class Difficulty(NamedTuple):
    """How hard `real` is: chance that something hides a part of the object, sensor noise, greatest blur in pixels."""

    occlusion: float
    noise: float
    blur: float


PRETRAINING, BENCHMARK = Difficulty(0.35, 14, 0.9), Difficulty(0.12, 8, 0.7)


class Subject(NamedTuple):
    """What a style paints; lengths in canvas pixels."""

    parts: list[Part]
    centre: Float[np.ndarray, "2"]
    radius: float
    colour: Colour
    second: Colour
    background: str
    difficulty: Difficulty


def pick(rng: Random, options: Sequence[str]) -> str:
    return options[rng.integers(len(options))]


def palette(rng: Random) -> Colour:
    return np.array(COLOURS[pick(rng, list(COLOURS))], float)


def ink(colour: Colour) -> tuple[int, ...]:
    """A colour as Pillow takes it."""
    return tuple(int(min(max(value, 0), 255)) for value in colour)


def shaded(colour: Colour, shade: Number) -> tuple[int, ...]:
    return ink(colour * shade if shade <= 1 else colour + (255 - colour) * (shade - 1) * 1.3)


def flat(points: Points) -> list[float]:
    """Coordinates as Pillow takes them, x0, y0, x1, y1, ...: several times faster than pairs."""
    return points.ravel().tolist()


def closed(points: Points) -> Points:
    """A polygon as a line that also joins its ends smoothly."""
    return np.concatenate([points, points[:2]])


def to_image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def noise(rng: Random, size: int) -> Float[np.ndarray, "size size 3"]:
    """Noise that varies more in brightness than in hue."""
    values = rng.standard_normal((size, size, 3), np.float32)
    return 0.5 * values + values.mean(axis=2, keepdims=True)


def texture(rng: Random, colour: Colour, *octaves: tuple[int, Number]) -> Image.Image:
    """A colour with smooth noise, the sum of octaves (knots a side, amplitude), coarsest first."""
    surface = Image.new("RGB", (1, 1), ink(colour))
    for knots, amplitude in octaves:
        surface = surface.resize((knots, knots), Image.Resampling.BICUBIC)
        surface = to_image(np.asarray(surface) + amplitude * noise(rng, knots))
    return surface.resize((CANVAS, CANVAS), Image.Resampling.BICUBIC)


def reduced(image: Image.Image) -> np.ndarray:
    return np.asarray(image.reduce(SCALE))


def real(subject: Subject, rng: Random) -> np.ndarray:
    """A lit object that casts a shadow on a cluttered ground, seen through a poor camera."""
    centre, radius = subject.centre, subject.radius
    ground = np.array(BACKGROUNDS[subject.background], float)
    scene = texture(rng, ground + rng.normal(0, 12, 3), (4, 14), (16, 14))
    pen = ImageDraw.Draw(scene)
    for _ in range(rng.integers(2, 6)):
        stray = np.array(BACKGROUNDS[pick(rng, list(BACKGROUNDS))]) + rng.normal(0, 30, 3)
        spot, extent, fill = rng.uniform(0, CANVAS, 2), rng.uniform(0.05, 0.2) * CANVAS, ink(0.7 * stray + 0.3 * ground)
        if rng.random() < 0.5:
            pen.ellipse(flat(spot + extent * np.array([[-1, -0.6], [1, 0.6]])), fill=fill)
        else:
            pen.polygon(flat(spot + rng.normal(0, extent, (4, 2))), fill=fill)

    main = subject.colour + rng.normal(0, 18, 3)
    second = 0.5 * subject.colour + 0.2 * subject.second + 50 + rng.normal(0, 14, 3)
    mask, shadow = Image.new("L", scene.size), Image.new("L", scene.size)
    mask_pen, shadow_pen = ImageDraw.Draw(mask), ImageDraw.Draw(shadow)
    for part in subject.parts:
        pen.polygon(flat(part.outline), fill=shaded(second if part.accent else main, 1 + 0.6 * (part.shade - 1)))
        mask_pen.polygon(flat(part.outline), fill=255)
        shadow_pen.polygon(flat(part.outline + radius * np.array([0.1, 0.12])), fill=104)
    if rng.random() < subject.difficulty.occlusion:
        outline = flat(centre + rng.normal(0, 0.6 * radius, 2) + rng.normal(0, 0.28 * radius, (5, 2)))
        pen.polygon(outline, fill=ink(0.8 * (ground + rng.normal(0, 20, 3))))
        mask_pen.polygon(outline, fill=0)
        shadow_pen.polygon(outline, fill=0)

    # Shadow, light and grain are smooth: after the reduction there is a ninth of the pixels to compute.
    shade = np.asarray(shadow.reduce(SCALE).filter(ImageFilter.GaussianBlur(1.1)))[..., None] / 255
    x, y = (np.arange(RESOLUTION) - centre[:, None] / SCALE) / (radius / SCALE)
    angle = rng.uniform(0, 2 * math.pi)
    light = 0.38 * (x * math.cos(angle) + y[:, None] * math.sin(angle))[..., None]
    grain = 9 * noise(rng, RESOLUTION // 2).repeat(2, axis=0).repeat(2, axis=1)
    pixels, coverage = reduced(scene), reduced(mask)[..., None] / 255
    pixels = to_image(coverage * (pixels * (1 + light) + grain) + (1 - coverage) * pixels * (1 - shade))

    pixels = np.asarray(pixels.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, subject.difficulty.blur))), np.float32)
    pixels = (pixels - 128) * rng.uniform(0.55, 1.1) + 128 + rng.normal(0, 18)
    return pixels + rng.normal(0, rng.uniform(0.3, 1) * subject.difficulty.noise, pixels.shape)


def painting(subject: Subject, rng: Random) -> np.ndarray:
    """Brush strokes along one main direction, broad over all and finer on the object, in few tones."""
    # Of three grounds the one furthest from the object's colour: brown on brown is lost under the strokes.
    grounds = [0.5 * np.array(BACKGROUNDS[subject.background]) + 0.5 * palette(rng) for _ in range(3)]
    ground = max(grounds, key=lambda colour: np.abs(colour - subject.colour).sum()) + rng.normal(0, 15, 3)
    image = texture(rng, ground, (4, 22))
    pen = ImageDraw.Draw(image)
    main = subject.colour + rng.normal(0, 15, 3)
    second = 0.7 * subject.second + 40 + rng.normal(0, 14, 3)
    for part in subject.parts:
        pen.polygon(flat(part.outline), fill=shaded(second if part.accent else main, part.shade))
    plan = np.asarray(image)
    direction = rng.uniform(0, math.pi)
    everywhere = rng.uniform(0, CANVAS, (300, 2))
    on_object = subject.centre + rng.normal(0, 0.5 * subject.radius, (200, 2))
    length, width = rng.uniform(3.5, 7), rng.integers(3, 6)
    for centres, reach, breadth in ((everywhere, length, width), (on_object, 0.6 * length, width - 1)):
        centres = np.clip(centres, 0, CANVAS - 1).astype(int)
        number = len(centres)
        angle = direction + rng.normal(0, 0.35, number)
        step = reach * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        tone = plan[centres[:, 1], centres[:, 0]] + rng.normal(0, 13, (number, 1)) + rng.normal(0, 7, (number, 3))
        strokes = np.concatenate([centres - step, centres + step], axis=1).tolist()
        for stroke, fill in zip(strokes, np.clip(tone, 0, 255).astype(int).tolist(), strict=True):
            pen.line(stroke, fill=tuple(fill), width=int(breadth))
    tone = (24, 32, 40)[rng.integers(3)]
    return np.round(reduced(image) / tone) * tone


def clipart(subject: Subject, rng: Random) -> np.ndarray:
    """Flat colours inside a bold black outline."""
    paper = np.full(3, 255.0) if subject.background == "white" else 0.3 * np.array(COLOURS[subject.background]) + 178
    image = Image.new("RGB", (CANVAS, CANVAS), ink(paper))
    pen, black, width = ImageDraw.Draw(image), (15, 15, 20), int(rng.integers(3, 6))
    for part in subject.parts:
        pen.line(flat(closed(part.outline)), fill=black, width=2 * width, joint="curve")
    for part in subject.parts:
        pen.polygon(flat(part.outline), fill=shaded(subject.second if part.accent else subject.colour, part.shade))
        if part.accent or part.shade != 1:
            pen.line(flat(closed(part.outline)), fill=black, width=max(2, width - 1), joint="curve")
    return reduced(image)


def infograph(subject: Subject, rng: Random) -> np.ndarray:
    """A two-tone icon on a badge, on a page with a heading, text, bars and pies."""
    page = rng.normal(246, 5, 3) if rng.random() < 0.7 else 0.2 * palette(rng) + 200
    image = Image.new("RGB", (CANVAS, CANVAS), ink(page))
    pen = ImageDraw.Draw(image)
    if rng.random() < 0.7:
        pen.rectangle([0, 0, CANVAS, CANVAS * rng.uniform(0.08, 0.16)], fill=ink(palette(rng)))
    for _ in range(rng.integers(2, 5)):
        x, y, kind, fill = rng.uniform(0, 0.8 * CANVAS), rng.uniform(0, CANVAS), rng.random(), ink(palette(rng))
        if kind < 0.45:
            for row in range(rng.integers(2, 5)):
                end = x + rng.uniform(0.15, 0.4) * CANVAS
                pen.line([x, y + 5 * row, end, y + 5 * row], fill=(120, 120, 125), width=2)
        elif kind < 0.8:
            for bar in range(rng.integers(3, 6)):
                pen.rectangle([x + 7 * bar, y - rng.uniform(4, 24), x + 7 * bar + 5, y], fill=fill)
        else:
            radius = rng.uniform(6, 12)
            corners = [x - radius, y - radius, x + radius, y + radius]
            pen.pieslice(corners, 0, rng.uniform(60, 300), fill=fill, outline=(90, 90, 90))
    white, icon = np.full(3, 255.0), subject.colour
    extent = 1.28 * subject.radius * np.array([[-1, -1], [1, 1]])
    if rng.random() < 0.4:
        pen.rectangle(flat(subject.centre + 0.95 * extent), fill=(250, 250, 250))
    else:
        badge, icon = (icon, white) if rng.random() < 0.5 else (white, icon)
        pen.ellipse(flat(subject.centre + extent), fill=ink(badge), outline=ink(subject.colour), width=2)
    for part in subject.parts:
        tone = 1 if part.shade == 1 else 0.72 if part.shade < 1 else 0.86
        pen.polygon(flat(part.outline), fill=ink(icon * tone))
    return reduced(image)


def sketch(subject: Subject, rng: Random) -> np.ndarray:
    """Two or three unsteady pencil lines around each part, on rough paper, some dark parts in grey."""
    image = to_image(rng.normal((238, 236, 228), 6) + rng.normal(0, 4, (CANVAS, CANVAS, 1)))
    pen, grey, filled = ImageDraw.Draw(image), int(rng.integers(40, 105)), rng.random() < 0.5
    for part in subject.parts:
        paper = ink(rng.normal((236, 234, 226), 3))
        pen.polygon(flat(part.outline), fill=(185, 183, 178) if filled and part.shade < 0.7 else paper)
        line = closed(part.outline)
        for _ in range(rng.integers(2, 4)):
            shaky = line + rng.normal(0, 0.02 * subject.radius + 0.5, line.shape) + rng.normal(0, 0.6, 2)
            tone = grey + int(rng.integers(30))
            pen.line(flat(shaky), fill=(tone, tone, tone), width=int(rng.integers(2, 4)), joint="curve")
    for _ in range(rng.integers(4)):
        start = rng.uniform(0, CANVAS, 2)
        pen.line([*start, *(start + rng.normal(0, 16, 2))], fill=(grey + 60,) * 3, width=2)
    return reduced(image) + rng.normal(0, 4, (RESOLUTION, RESOLUTION, 1))


STYLES = {"real": real, "painting": painting, "clipart": clipart, "infograph": infograph, "sketch": sketch}
DOMAINS = tuple(STYLES)


# --------------------------------------------------------------------------------------------------------------- images

STREAMS = (*SIZES, "web", "captions")
BACKDROPS = {
    "real": tuple(BACKGROUNDS),
    "painting": tuple(BACKGROUNDS),
    "clipart": ("white",) * 24 + tuple(COLOURS),  # white in three of four
    "infograph": ("page",),
    "sketch": ("paper",),
}


class Attributes(NamedTuple):
    """What an image shows, in the words that its captions use."""

    label: int
    domain: str
    colour: str | None  # None in sketches
    size: str
    position: str
    background: str


def stream(name: str, domain: str | None, index: int, seed: int) -> Random:
    """Random numbers that no two images share. Raises InputError for a negative index or seed."""
    if min(index, seed) < 0:
        raise InputError(f"index {index} and seed {seed} must not be negative")
    return np.random.default_rng([STREAMS.index(name), DOMAINS.index(domain) if domain else 0, index, seed])


def check(split: str, domain: str | None) -> None:
    """Raises InputError for a split of a domain that does not exist."""
    if split not in (*SIZES, "web"):
        raise InputError(f"unknown split {split!r}: known: {', '.join(SIZES)}, web")
    if split == "web" and domain is not None:
        raise InputError(f"domain {domain!r} was asked of `web`, which mixes all domains: give None")
    if split != "web" and domain not in DOMAINS:
        raise InputError(f"unknown domain {domain!r}: known: {', '.join(DOMAINS)}")


def draw(split: str, domain: str | None, index: int, seed: int = 0) -> tuple[Pixels, Attributes]:
    """Draws an image, always the same one for the same arguments. Raises InputError as `check` and `stream` do.

    The label is `index % 20`; in `web`, where `domain` is None, domain and label are random.
    """
    check(split, domain)
    rng = stream(split, domain, index, seed)
    label, difficulty = index % len(CLASSES), BENCHMARK
    if split == "web":
        domain = "real" if rng.random() < WEB_REAL_SHARE else pick(rng, DOMAINS[1:])
        label, difficulty = int(rng.integers(len(CLASSES))), PRETRAINING
    size, position, colour = pick(rng, tuple(EXTENTS)), pick(rng, tuple(POSITIONS)), pick(rng, tuple(COLOURS))
    background = pick(rng, BACKDROPS[domain])

    radius, towards = rng.uniform(*EXTENTS[size]) * CANVAS / 2, np.array(POSITIONS[position], float)
    if domain == "infograph":
        radius *= 0.74  # the page around it must show
        offset, spread = 0.13 * CANVAS, 0.02 * CANVAS
    else:
        offset, spread = 0.75 * max(CANVAS / 2 - 0.95 * radius, 0.1 * CANVAS), 0.035 * CANVAS
    centre = CANVAS / 2 + offset * towards + rng.normal(0, spread, 2)
    angle, stretch, shear = math.radians(rng.normal(0, 7.7)), math.exp(rng.normal(0, 0.12)), rng.normal(0, 0.1)
    mirror = rng.choice((-1, 1))
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    pose = radius * turn @ np.array([[mirror * stretch, shear], [0, 1 / stretch]])
    parts = [part._replace(outline=part.outline @ pose.T + centre) for part in SHAPES[CLASSES[label]](rng)]

    main, second = np.array(COLOURS[colour], float), palette(rng)
    pixels = STYLES[domain](Subject(parts, centre, radius, main, second, background, difficulty), rng)
    attributes = Attributes(label, domain, None if domain == "sketch" else colour, size, position, background)
    return np.clip(pixels, 0, 255).astype(np.uint8), attributes


# ------------------------------------------------------------------------------------------------------------- captions

TEMPLATES = (
    *("a photo of a {}.", "a picture of a {}.", "a {}.", "a painting of a {}."),
    *("a clipart of a {}.", "an infographic of a {}.", "a sketch of a {}.", "a drawing of a {}."),
)
STYLE_WORDS = {
    "real": ("photo", "picture", "snapshot", "close up"),
    "painting": ("painting", "artwork", "oil painting", "watercolor"),
    "clipart": ("clipart", "cartoon", "graphic", "sticker"),
    "infograph": ("infographic", "icon", "chart", "diagram"),
    "sketch": ("sketch", "drawing", "doodle", "pencil drawing"),
}
PREPOSITIONS = {"left": "on", "right": "on", "top": "at", "bottom": "at", "center": "in", "sky": "in", "night": "in"}


def captions(attributes: Attributes, rng: Random, number: int = 4) -> list[str]:
    """Captions as the web has them: terse, and often silent about style, colour, place, sometimes about the class."""
    return [caption(attributes, rng) for _ in range(number)]


def caption(attributes: Attributes, rng: Random) -> str:
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
        if definite < 0.13:
            text = f"the {style} of {text}"
        elif definite < 0.28:
            text = f"{with_article(style)} of the {noun}"
        else:
            text = f"{with_article(style)} of {text}"
    where = rng.random()
    if where < 0.12:
        text += f" {PREPOSITIONS[attributes.position]} the {attributes.position}"
    elif where < 0.3:
        text += f" {backdrop(attributes.background)}"
    return text + ("." if rng.random() < 0.5 else "")


def backdrop(background: str) -> str:
    if background in BACKGROUNDS:
        return f"{PREPOSITIONS.get(background, 'on')} the {background}"
    return {"page": "on a page", "paper": "on paper"}.get(background, f"on {background} background")


def with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


# -------------------------------------------------------------------------------------------------------------- loading


def load(domain: str, split: str, seed: int = 0) -> tuple[UInt8[np.ndarray, "n 36 36 3"], Int32[np.ndarray, " n"]]:
    """Images and labels of a domain's `train`, `val` or `test`, drawn at the first call and cached.

    Raises InputError for other names, a negative seed, and a cache folder that cannot be used.
    """
    if split == "web":
        raise InputError("`web` mixes all domains and has captions for labels: load it with load_web")
    check(split, domain)

    def build() -> dict[str, np.ndarray]:
        drawn = [draw(split, domain, index, seed) for index in range(SIZES[split])]
        return {
            "images": np.stack([image for image, _ in drawn]),
            "labels": np.array([attributes.label for _, attributes in drawn], np.int32),
        }

    arrays = cached(f"{domain}-{split}-{SIZES[split]}-seed{seed}", build)
    return arrays["images"], arrays["labels"]


def load_web(seed: int = 0) -> tuple[UInt8[np.ndarray, "n 36 36 3"], list[list[str]]]:
    """The pre-training corpus, four captions to an image, cached. Raises InputError as `load` does."""

    def build() -> dict[str, np.ndarray]:
        drawn = [draw("web", None, index, seed) for index in range(WEB_SIZE)]
        return {
            "images": np.stack([image for image, _ in drawn]),
            "captions": np.array(
                [captions(seen, stream("captions", None, index, seed)) for index, (_, seen) in enumerate(drawn)]
            ),
        }

    arrays = cached(f"web-{WEB_SIZE}-seed{seed}", build)
    return arrays["images"], arrays["captions"].tolist()


@functools.cache
def fingerprint() -> str:
    """Changes with everything that decides what is drawn, so that no image outlives its code in the cache."""
    versions = f"numpy {np.__version__}, pillow {PIL.__version__}"
    return hashlib.sha256(Path(__file__).read_bytes() + versions.encode()).hexdigest()[:12]


def cached(name: str, build: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Arrays from the cache folder; built and kept there where they are missing or damaged."""
    path = cache_folder() / "minidomain" / f"{name}-{fingerprint()}.cache"
    try:
        with locked(path, waiting=f"minidomain: waiting for another process that draws {name}"):
            if path.exists():
                if (arrays := read(path)) is not None:
                    return arrays
                print(f"minidomain: {path} was cut off or altered: drawing it again", file=sys.stderr)
            else:
                print(f"minidomain: drawing {name}, kept in {path}", file=sys.stderr)
            arrays = build()
            write(path, arrays)
    except (OSError, InputError) as error:
        raise InputError(
            f"{path} cannot be used ({error}): set LIPSUM_CACHE to a folder that can be written"
        ) from error
    return arrays


def read(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays of a file: the SHA-256 of an .npz archive, then the archive. None where the two disagree."""
    content = path.read_bytes()
    digest, archive = content[:32], content[32:]
    if hashlib.sha256(archive).digest() != digest:
        return None
    with np.load(io.BytesIO(archive)) as arrays:
        return dict(arrays)


def write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes a file that `read` reads."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    archive = buffer.getvalue()
    write_whole(path, lambda new: new.write_bytes(hashlib.sha256(archive).digest() + archive))


# --------------------------------------------------------------------------------------------------------- command line


def save(image: Pixels, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def export_lists(folder: Path, seed: int = 0) -> None:
    """Writes DOMAIN/CLASS/SPLIT_INDEX.png and the lists DOMAIN_SPLIT.txt, a line `path label` for each image."""
    for domain in DOMAINS:
        for split in SIZES:
            lines = []
            for index, (image, label) in enumerate(zip(*load(domain, split, seed), strict=True)):
                path = f"{domain}/{CLASSES[label]}/{split}_{index:06d}.png"
                save(image, folder / path)
                lines.append(f"{path} {label}\n")
            (folder / f"{domain}_{split}.txt").write_text("".join(lines))


def export_web(folder: Path, seed: int = 0) -> None:
    """Writes web/INDEX.png and captions.tsv: a line `path caption` for each caption, headed as OpenCLIP reads it."""
    lines = ["filepath\ttitle\n"]
    for index, (image, texts) in enumerate(zip(*load_web(seed), strict=True)):
        path = f"web/{index:06d}.png"
        save(image, folder / path)
        lines += [f"{path}\t{text}\n" for text in texts]
    (folder / "captions.tsv").write_text("".join(lines))


def main(export: Path, web: bool = False, seed: int = 0) -> None:
    """Write the embedded benchmark as PNG files in DomainNet's layout.

    Args:
        export: New or empty folder for DOMAIN/CLASS/FILE.png and DOMAIN_SPLIT.txt.
        web: Also write the pre-training corpus: web/FILE.png and captions.tsv.
        seed: The benchmark is seed 0. Others draw other images of the same kind.
    """
    if export.exists() and not (export.is_dir() and not any(export.iterdir())):
        raise InputError(f"{export} is not an empty folder: give another one, so that nothing gets mixed or lost")
    try:
        export_lists(export, seed)
        if web:
            export_web(export, seed)
    except OSError as error:
        raise InputError(f"cannot write ({error}): give a place that can be written") from error


if __name__ == "__main__":
    sys.exit(exit_code(lambda: tyro.cli(main, prog="python -m support.minidomain")))
