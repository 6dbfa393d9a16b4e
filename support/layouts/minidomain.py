"""The embedded benchmark: images of 20 classes drawn in DomainNet's five domains, for a CPU.

Lipsum-FT (https://openreview.net/forum?id=2JF8mJRJ7M) fine-tunes on DomainNet's `real` and tests on
all five domains. Nothing is downloaded: each image is drawn from (split, domain, index, seed), and
drawn splits are kept in the cache folder. `python train.py` uses it.
"""

import functools
import hashlib
import math
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
from jaxtyping import Float, Int32, UInt8
from PIL import Image, ImageDraw, ImageFilter

from data import Data, Split
from support.disk import cache_folder, write_whole
from support.errors import InputError
from support.layouts.common import add_selection, choose_shifts

RESOLUTION = 36
SCALE = 3  # images are drawn larger, then reduced: Pillow does not anti-alias polygons and lines
CANVAS = SCALE * RESOLUTION
SIZES = {"train": 4000, "val": 500, "test": 1000}  # images per domain
TEMPLATES = (
    *("a photo of a {}.", "a picture of a {}.", "a {}.", "a painting of a {}."),
    *("a clipart of a {}.", "an infographic of a {}.", "a sketch of a {}.", "a drawing of a {}."),
)

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
# Radius, in half canvases.
EXTENTS = {"small": (0.60, 0.68), "medium": (0.74, 0.82), "large": (0.88, 0.96)}
POSITIONS = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1), "center": (0, 0)}

Random = np.random.Generator
Real = int | float
Points = Float[np.ndarray, "_ 2"]
Colour = Float[np.ndarray, "3"]


# ------------------------------------------------------------------------------------------- shapes


class Piece(NamedTuple):
    """A filled polygon in [-1, 1]^2, y pointing down."""

    outline: Points
    shade: Real = 1  # below 1: darker; above 1: closer to white
    accent: bool = False  # filled with the subject's second colour


Shape = Iterator[Piece]  # back to front
accent = functools.partial(Piece, accent=True)  # a part in the subject's second colour


def polygon(*coordinates: Real) -> Points:
    return np.array(coordinates, float).reshape(-1, 2)


def box(left: Real, top: Real, right: Real, bottom: Real) -> Points:
    return polygon(left, top, right, top, right, bottom, left, bottom)


def ellipse(
    x: Real, y: Real, rx: float, ry: float, start: Real = 0, stop: Real = 2, number: int = 0
) -> Points:
    """Points on an ellipse between two angles, in units of pi, clockwise from the right."""
    number = number or round(6 + 9 * rx * abs(stop - start))
    angles = math.pi * np.linspace(start, stop, number, endpoint=stop - start < 2)
    return np.stack([x + rx * np.cos(angles), y + ry * np.sin(angles)], axis=1)


def band(line: Points, half_width: float) -> Points:
    """Outline of a line drawn with a pen of width `2 * half_width`."""
    along = np.gradient(line, axis=0)
    across = np.stack([-along[:, 1], along[:, 0]], axis=1)
    across *= half_width / np.maximum(np.linalg.norm(across, axis=1, keepdims=True), 1e-9)
    return np.concatenate([line + across, (line - across)[::-1]])


def union(
    x: Real, y: Real, ellipses: Sequence[tuple[Real, Real, float, float]], number: int = 48
) -> Points:
    """Outline of overlapping ellipses (x, y, rx, ry), seen from a point (x, y) in one of them."""
    angles = 2 * math.pi * np.arange(number) / number
    rays = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    reach = np.zeros(number)
    for centre_x, centre_y, *radii in ellipses:
        ray = rays / radii
        offset = np.array([x - centre_x, y - centre_y]) / radii
        # On the ellipse, a t^2 + 2 b t + c = 0.
        a = (ray**2).sum(1)
        b = ray @ offset
        c = offset @ offset - 1
        root = b**2 - a * c
        reach = np.maximum(reach, np.where(root > 0, (-b + np.sqrt(np.maximum(root, 0))) / a, 0))
    return [x, y] + reach[:, None] * rays


def sometimes(rng: Random, chance: float, part: Piece) -> Shape:
    if rng.random() < chance:
        yield part


def star(rng: Random) -> Shape:
    points = (5, 5, 5, 6)[rng.integers(4)]
    radius = np.where(np.arange(2 * points) % 2 == 0, 1, rng.uniform(0.36, 0.5))
    angle = np.arange(2 * points) * math.pi / points - math.pi / 2
    yield Piece(np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1))


def heart(rng: Random) -> Shape:
    t = np.linspace(0, 2 * math.pi, 30, endpoint=False)
    height = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    y = -(height + 1) / 16 * rng.uniform(0.85, 1.05)
    yield Piece(np.stack([16 / 17 * np.sin(t) ** 3, y], axis=1))


def house(rng: Random) -> Shape:
    eaves = rng.uniform(-0.25, 0.05)
    yield from sometimes(rng, 0.4, Piece(box(0.4, -0.9, 0.65, -0.3), 0.7))  # a chimney
    yield Piece(box(-0.7, eaves, 0.7, 0.9))
    yield accent(polygon(-0.95, eaves, 0, -0.95, 0.95, eaves), 0.6)
    yield from sometimes(rng, 0.7, accent(box(-0.15, 0.3, 0.2, 0.9), 0.45))  # a door
    yield from sometimes(rng, 0.7, accent(box(0.32, 0.2, 0.58, 0.5), 1.5))  # a window


def tree(rng: Random) -> Shape:
    yield accent(box(-0.15, 0.1, 0.15, 1), 0.5)
    if rng.random() < 0.5:  # a conifer
        yield Piece(polygon(-0.75, 0.55, 0, -0.35, 0.75, 0.55), 0.9)
        yield Piece(polygon(-0.55, 0, 0, -0.95, 0.55, 0), 1.1)
    else:
        lobes = [(x, y, 0.36, 0.35) for x, y in ((-0.4, 0), (0.4, 0), (-0.25, -0.5), (0.25, -0.5))]
        yield Piece(union(0, -0.2, [(0, -0.2, 0.4, 0.5), *lobes]))


def fish(rng: Random) -> Shape:
    depth = rng.uniform(0.36, 0.52)
    yield Piece(polygon(0.4, 0, 1, -0.55, 0.85, 0, 1, 0.55), 0.8)
    yield Piece(ellipse(-0.15, 0, 0.8, depth))
    yield accent(ellipse(-0.58, -0.12, 0.1, 0.1), 0.2)
    fin = polygon(-0.2, -depth * 0.95, 0.2, -depth - 0.28, 0.25, -depth * 0.85)
    yield from sometimes(rng, 0.5, Piece(fin, 0.8))


def car(rng: Random) -> Shape:
    roof = rng.uniform(-0.55, -0.38)
    yield Piece(polygon(-0.58, 0, -0.38, roof, 0.36, roof, 0.64, 0), 0.85)
    yield accent(polygon(-0.43, -0.03, -0.3, roof + 0.12, 0.29, roof + 0.12, 0.46, -0.03), 1.6)
    yield Piece(box(-1, -0.02, 1, 0.45))
    yield accent(ellipse(-0.55, 0.47, 0.26, 0.26), 0.25)
    yield accent(ellipse(0.55, 0.47, 0.26, 0.26), 0.25)


def cup(rng: Random) -> Shape:
    foot = rng.uniform(0.5, 0.68)
    yield Piece(band(ellipse(0.52, -0.05, 0.4, 0.4, -0.41, 0.48), 0.1), 0.8)
    yield Piece(polygon(-0.68, -0.65, 0.62, -0.65, foot * 0.8, 0.75, -foot * 0.85, 0.75))
    yield accent(ellipse(-0.03, -0.65, 0.65, 0.17), 0.5)


def key(rng: Random) -> Shape:
    yield Piece(band(ellipse(-0.58, 0, 0.31, 0.33, 0, 1.99), 0.12))
    yield Piece(box(-0.28, -0.11, 0.95, 0.11))
    yield Piece(box(0.74, 0.1, 0.94, 0.5))
    yield from sometimes(rng, 0.8, Piece(box(0.4, 0.1, 0.58, 0.4)))


def umbrella(rng: Random) -> Shape:
    handle = [polygon(0, -0.1, 0, 0.3, 0, 0.7), ellipse(0.16, 0.75, 0.16, 0.2, 1, 0)]
    yield accent(band(np.concatenate(handle), 0.065), 0.4)
    scallops = [ellipse(x, 0, 0.245, -0.16, 0, 1, number=7) for x in (0.735, 0.245, -0.245, -0.735)]
    yield Piece(np.concatenate([ellipse(0, 0, 0.98, 0.9, 1, 2), *scallops]))
    yield from sometimes(rng, 0.5, Piece(polygon(0, -0.9, 0.25, -0.02, -0.25, -0.02), 0.7))


def moon(rng: Random) -> Shape:
    # A disc minus a second one: the tips lie at the angle `horn`, the inner edge is at x = -inner.
    horn = rng.uniform(0.2, 0.32)
    inner = rng.uniform(0.0, 0.3)
    x, y = 0.95 * math.cos(horn * math.pi), 0.95 * math.sin(horn * math.pi)
    centre = (0.95**2 - inner**2) / (2 * inner + 2 * x)
    angle = math.atan2(y, x - centre) / math.pi
    inner_edge = ellipse(0.2 + centre, 0, centre + inner, centre + inner, 2 - angle, angle)
    yield Piece(np.concatenate([ellipse(0.2, 0, 0.95, 0.95, horn, 2 - horn), inner_edge]))


def cloud(rng: Random) -> Shape:
    puffs = [(-0.58, 0.1, 0.36, 0.34), (-0.14, -0.15, 0.32, rng.uniform(0.38, 0.5))]
    puffs += [(0.3, -0.05, 0.29, 0.38), (0.62, 0.16, 0.34, 0.29), (0, 0.2, 0.6, 0.3)]
    outline = union(0, 0.15, puffs)
    yield Piece(np.minimum(outline, [1, 0.45]))  # a flat bottom


def mushroom(rng: Random) -> Shape:
    yield accent(polygon(-0.24, 0, 0.24, 0, 0.32, 0.95, -0.32, 0.95), 1.5)
    dome = ellipse(0, 0.1, 0.95, rng.uniform(0.8, 1.05), 1, 2)
    yield Piece(np.concatenate([dome, polygon(0.6, 0.22, -0.6, 0.22)]))
    for x, y in ((-0.4, -0.2), (0.15, -0.5), (0.45, -0.1)):
        yield from sometimes(rng, 0.6, accent(ellipse(x, y, 0.15, 0.13), 1.6))


def rocket(rng: Random) -> Shape:
    yield from sometimes(rng, 0.5, accent(polygon(-0.2, 0.7, 0, 1.1, 0.2, 0.7), 1.4))  # a flame
    yield accent(polygon(-0.3, 0.3, -0.78, 0.9, -0.3, 0.75), 0.7)
    yield accent(polygon(0.3, 0.3, 0.78, 0.9, 0.3, 0.75), 0.7)
    side = polygon(0.28, -0.55, 0.34, 0, 0.28, 0.75)
    yield Piece(np.concatenate([polygon(0, -1), side, side[::-1] * [-1, 1]]))
    yield accent(ellipse(0, -0.25, 0.16, 0.16), 1.6)


def crown(rng: Random) -> Shape:
    tip = rng.uniform(-0.75, -0.5)
    left = (-0.85, 0.65, -0.95, tip, -0.45, 0)
    yield Piece(polygon(*left, 0, tip - 0.15, 0.45, 0, 0.95, tip, 0.85, 0.65))
    yield accent(box(-0.85, 0.45, 0.85, 0.7), 0.7)
    if rng.random() < 0.6:
        for x, y in ((-0.95, tip), (0, tip - 0.15), (0.95, tip)):
            yield accent(ellipse(x, y, 0.1, 0.1), 1.4)


def bell(rng: Random) -> Shape:
    flare = rng.uniform(0.82, 0.95)
    yield accent(ellipse(0, 0.72, 0.2, 0.2), 0.5)
    right = polygon(flare, 0.68, 0.62, 0.4, 0.52, -0.2, 0.35, -0.65)
    yield Piece(np.concatenate([right, polygon(0, -0.85), right[::-1] * [-1, 1]]))
    yield accent(ellipse(0, -0.88, 0.12, 0.12), 0.8)


def boat(rng: Random) -> Shape:
    yield Piece(polygon(-0.95, 0.4, 0.95, 0.4, 0.6, 0.85, -0.6, 0.85))
    yield accent(box(-0.06, -0.95, 0.04, 0.4), 0.4)
    yield accent(polygon(0.1, -0.9, 0.75, 0.3, 0.1, 0.3), 1.5)
    jib = polygon(-0.12, -0.7, -0.6, 0.3, -0.12, 0.3)
    yield from sometimes(rng, 0.6, accent(jib, 1.3))


def flower(rng: Random) -> Shape:
    yield accent(box(-0.06, 0.1, 0.06, 1), 0.5)
    for x, y in ellipse(0, -0.3, 0.42, 0.42, number=int(rng.integers(5, 8))):
        yield Piece(ellipse(x, y, 0.26, 0.26))
    yield accent(ellipse(0, -0.3, 0.23, 0.23), 1.5)


def apple(rng: Random) -> Shape:
    width = rng.uniform(0.5, 0.58)
    yield accent(band(polygon(0, -0.35, 0.04, -0.7, 0.12, -0.95), 0.06), 0.4)
    yield Piece(union(0, 0.15, [(-0.28, 0.15, width, 0.68), (0.28, 0.15, width, 0.68)]))
    yield accent(polygon(0.1, -0.6, 0.4, -0.95, 0.6, -0.75, 0.35, -0.58), 0.8)


def chair(rng: Random) -> Shape:
    if rng.random() < 0.5:  # from the side
        yield Piece(box(-0.6, -0.95, -0.42, 0.95))
        yield Piece(box(0.42, 0.15, 0.6, 0.95), 0.8)
        yield Piece(box(-0.6, 0, 0.65, 0.22))
        yield Piece(box(-0.6, -0.95, -0.3, 0), 0.85)
    else:
        yield Piece(box(-0.55, -0.95, 0.55, -0.1), 0.8)
        yield Piece(box(-0.65, 0, 0.65, 0.25))
        yield Piece(box(-0.6, 0.25, -0.42, 0.98), 0.7)
        yield Piece(box(0.42, 0.25, 0.6, 0.98), 0.7)


def bottle(rng: Random) -> Shape:
    width = rng.uniform(0.3, 0.42)
    neck = (-0.13, -0.8, 0.13, -0.8, 0.14, -0.4)
    yield Piece(polygon(*neck, width, -0.1, width, 0.95, -width, 0.95, -width, -0.1, -0.14, -0.4))
    yield accent(box(-0.17, -1, 0.17, -0.8), 0.5)
    yield from sometimes(rng, 0.7, accent(box(-width, 0.2, width, 0.6), 1.5))  # a label


shapes = [star, heart, house, tree, fish, car, cup, key, umbrella, moon]
shapes += [cloud, mushroom, rocket, crown, bell, boat, flower, apple, chair, bottle]
SHAPES: dict[str, Callable[[Random], Shape]] = {shape.__name__: shape for shape in shapes}
CLASSES = tuple(SHAPES)  # in label order


# ------------------------------------------------------------------------------------------- styles


class Difficulty(NamedTuple):
    """What makes images of `real` hard to recognise."""

    occlusion: float  # the chance that an object is partly hidden
    sensor_noise: float
    blur: float  # the largest, in pixels


class Subject(NamedTuple):
    """The object that a style paints. Lengths are in canvas pixels."""

    parts: list[Piece]
    centre: Float[np.ndarray, "2"]
    radius: float
    colour: Colour
    second: Colour
    background: str
    difficulty: Difficulty


def pick(rng: Random, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def palette(rng: Random) -> Colour:
    return np.array(COLOURS[pick(rng, list(COLOURS))], float)


def ink(colour: Colour) -> tuple[int, ...]:
    """The colour as a tuple for Pillow."""
    return tuple(np.clip(colour, 0, 255).astype(int).tolist())


def shaded(colour: Colour, shade: Real) -> tuple[int, ...]:
    return ink(colour * shade if shade <= 1 else colour + (255 - colour) * (shade - 1) * 1.3)


def flattened(points: Points) -> list[float]:
    """Coordinates x0, y0, x1, y1, ..., which Pillow reads several times faster than pairs."""
    return points.ravel().tolist()


def closed(points: Points) -> Points:
    """The polygon as a line whose ends are also joined smoothly."""
    return np.concatenate([points, points[:2]])


def to_image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def noise(rng: Random, size: int) -> Float[np.ndarray, "size size 3"]:
    """Returns noise that varies more in brightness than in hue."""
    values = rng.standard_normal((size, size, 3), np.float32)
    return 0.5 * values + values.mean(axis=2, keepdims=True)


def texture(rng: Random, colour: Colour, *octaves: tuple[int, Real]) -> Image.Image:
    """Returns a colour plus smooth noise: octaves (knots per side, amplitude), coarsest first."""
    surface = Image.new("RGB", (1, 1), ink(colour))
    for knots, amplitude in octaves:
        surface = surface.resize((knots, knots), Image.Resampling.BICUBIC)
        surface = to_image(np.asarray(surface) + amplitude * noise(rng, knots))
    return surface.resize((CANVAS, CANVAS), Image.Resampling.BICUBIC)


def real(subject: Subject, rng: Random) -> np.ndarray:
    """Paints a lit object that casts a shadow on a cluttered ground, seen through a poor camera."""
    centre = subject.centre
    radius = subject.radius
    difficulty = subject.difficulty
    ground = np.array(BACKGROUNDS[subject.background], float)
    scene = texture(rng, ground + rng.normal(0, 12, 3), (4, 14), (16, 14))
    pen = ImageDraw.Draw(scene)
    for _ in range(rng.integers(2, 6)):
        stray = np.array(BACKGROUNDS[pick(rng, list(BACKGROUNDS))]) + rng.normal(0, 30, 3)
        fill = ink(0.7 * stray + 0.3 * ground)
        spot = rng.uniform(0, CANVAS, 2)
        extent = rng.uniform(0.05, 0.2) * CANVAS
        if rng.random() < 0.5:
            pen.ellipse(flattened(spot + extent * np.array([[-1, -0.6], [1, 0.6]])), fill=fill)
        else:
            pen.polygon(flattened(spot + rng.normal(0, extent, (4, 2))), fill=fill)

    main = subject.colour + rng.normal(0, 18, 3)
    second = 0.5 * subject.colour + 0.2 * subject.second + 50 + rng.normal(0, 14, 3)
    mask = Image.new("L", scene.size)
    shadow = Image.new("L", scene.size)
    mask_pen = ImageDraw.Draw(mask)
    shadow_pen = ImageDraw.Draw(shadow)
    for part in subject.parts:
        colour = shaded(second if part.accent else main, 1 + 0.6 * (part.shade - 1))
        pen.polygon(flattened(part.outline), fill=colour)
        mask_pen.polygon(flattened(part.outline), fill=255)
        shadow_pen.polygon(flattened(part.outline + radius * np.array([0.1, 0.12])), fill=104)
    if rng.random() < difficulty.occlusion:
        spot = centre + rng.normal(0, 0.6 * radius, 2)
        outline = flattened(spot + rng.normal(0, 0.28 * radius, (5, 2)))
        pen.polygon(outline, fill=ink(0.8 * (ground + rng.normal(0, 20, 3))))
        mask_pen.polygon(outline, fill=0)
        shadow_pen.polygon(outline, fill=0)

    # Shadow, light and grain are smooth, so they are computed on the reduced image.
    shade = np.asarray(shadow.reduce(SCALE).filter(ImageFilter.GaussianBlur(1.1)))[..., None] / 255
    x, y = (np.arange(RESOLUTION) - centre[:, None] / SCALE) / (radius / SCALE)
    angle = rng.uniform(0, 2 * math.pi)
    light = 0.38 * (x * math.cos(angle) + y[:, None] * math.sin(angle))[..., None]
    grain = 9 * noise(rng, RESOLUTION // 2).repeat(2, axis=0).repeat(2, axis=1)
    pixels = np.asarray(scene.reduce(SCALE))
    coverage = np.asarray(mask.reduce(SCALE))[..., None] / 255
    lit = pixels * (1 + light) + grain
    image = to_image(coverage * lit + (1 - coverage) * pixels * (1 - shade))
    blur = ImageFilter.GaussianBlur(rng.uniform(0.3, difficulty.blur))
    pixels = np.asarray(image.filter(blur), np.float32)
    pixels = (pixels - 128) * rng.uniform(0.55, 1.1) + 128 + rng.normal(0, 18)
    return pixels + rng.normal(0, rng.uniform(0.3, 1) * difficulty.sensor_noise, pixels.shape)


def painting(subject: Subject, rng: Random) -> np.ndarray:
    """Paints brush strokes along one direction, finer on the object than around, in few tones."""
    backdrop = np.array(BACKGROUNDS[subject.background])
    # A brown object on brown is lost under the strokes, so the ground differs from its colour.
    grounds = [0.5 * backdrop + 0.5 * palette(rng) for _ in range(3)]
    ground = max(grounds, key=lambda colour: np.abs(colour - subject.colour).sum())
    image = texture(rng, ground + rng.normal(0, 15, 3), (4, 22))
    pen = ImageDraw.Draw(image)
    main = subject.colour + rng.normal(0, 15, 3)
    second = 0.7 * subject.second + 40 + rng.normal(0, 14, 3)
    for part in subject.parts:
        colour = shaded(second if part.accent else main, part.shade)
        pen.polygon(flattened(part.outline), fill=colour)
    plan = np.asarray(image)
    direction = rng.uniform(0, math.pi)
    everywhere = rng.uniform(0, CANVAS, (300, 2))
    on_object = subject.centre + rng.normal(0, 0.5 * subject.radius, (200, 2))
    length = rng.uniform(3.5, 7)
    width = rng.integers(3, 6)
    strokes = ((everywhere, length, width), (on_object, 0.6 * length, width - 1))
    for centres, reach, breadth in strokes:
        centres = np.clip(centres, 0, CANVAS - 1).astype(int)
        angle = direction + rng.normal(0, 0.35, len(centres))
        step = reach * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        tone = plan[centres[:, 1], centres[:, 0]]
        tone = tone + rng.normal(0, 13, (len(centres), 1)) + rng.normal(0, 7, (len(centres), 3))
        lines = np.concatenate([centres - step, centres + step], axis=1).tolist()
        colours = np.clip(tone, 0, 255).astype(int).tolist()
        for line, colour in zip(lines, colours, strict=True):
            pen.line(line, fill=tuple(colour), width=int(breadth))
    tone = (24, 32, 40)[rng.integers(3)]
    return np.round(np.asarray(image.reduce(SCALE)) / tone) * tone


def clipart(subject: Subject, rng: Random) -> np.ndarray:
    """Paints flat colours inside a bold black outline."""
    paper = np.full(3, 255.0)
    if subject.background != "white":
        paper = 0.3 * np.array(COLOURS[subject.background]) + 178
    image = Image.new("RGB", (CANVAS, CANVAS), ink(paper))
    pen = ImageDraw.Draw(image)
    black = (15, 15, 20)
    width = int(rng.integers(3, 6))
    for part in subject.parts:
        pen.line(flattened(closed(part.outline)), fill=black, width=2 * width, joint="curve")
    for part in subject.parts:
        colour = shaded(subject.second if part.accent else subject.colour, part.shade)
        pen.polygon(flattened(part.outline), fill=colour)
        if part.accent or part.shade != 1:
            line = flattened(closed(part.outline))
            pen.line(line, fill=black, width=max(2, width - 1), joint="curve")
    return np.asarray(image.reduce(SCALE))


def infograph(subject: Subject, rng: Random) -> np.ndarray:
    """Paints a two-tone icon on a badge, on a page with a heading, text, bars and pies."""
    page = rng.normal(246, 5, 3) if rng.random() < 0.7 else 0.2 * palette(rng) + 200
    image = Image.new("RGB", (CANVAS, CANVAS), ink(page))
    pen = ImageDraw.Draw(image)
    if rng.random() < 0.7:
        pen.rectangle([0, 0, CANVAS, CANVAS * rng.uniform(0.08, 0.16)], fill=ink(palette(rng)))
    for _ in range(rng.integers(2, 5)):
        x, y = rng.uniform(0, (0.8 * CANVAS, CANVAS))
        kind = rng.random()
        fill = ink(palette(rng))
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
    icon = subject.colour
    extent = 1.28 * subject.radius * np.array([[-1, -1], [1, 1]])
    if rng.random() < 0.4:
        pen.rectangle(flattened(subject.centre + 0.95 * extent), fill=(250, 250, 250))
    else:
        badge = np.full(3, 255.0)
        if rng.random() < 0.5:
            badge, icon = icon, badge
        corners = flattened(subject.centre + extent)
        pen.ellipse(corners, fill=ink(badge), outline=ink(subject.colour), width=2)
    for part in subject.parts:
        tone = 1 if part.shade == 1 else 0.72 if part.shade < 1 else 0.86
        pen.polygon(flattened(part.outline), fill=ink(icon * tone))
    return np.asarray(image.reduce(SCALE))


def sketch(subject: Subject, rng: Random) -> np.ndarray:
    """Paints unsteady pencil lines around each part, on rough paper. Dark parts may be grey."""
    image = to_image(rng.normal((238, 236, 228), 6) + rng.normal(0, 4, (CANVAS, CANVAS, 1)))
    pen = ImageDraw.Draw(image)
    grey = int(rng.integers(40, 105))
    filled = rng.random() < 0.5
    for part in subject.parts:
        colour = ink(rng.normal((236, 234, 226), 3))  # the paper's
        if filled and part.shade < 0.7:
            colour = (185, 183, 178)
        pen.polygon(flattened(part.outline), fill=colour)
        line = closed(part.outline)
        spread = 0.02 * subject.radius + 0.5
        for _ in range(rng.integers(2, 4)):
            shaky = line + rng.normal(0, spread, line.shape) + rng.normal(0, 0.6, 2)
            tone = grey + int(rng.integers(30))
            width = int(rng.integers(2, 4))
            pen.line(flattened(shaky), fill=(tone, tone, tone), width=width, joint="curve")
    for _ in range(rng.integers(4)):
        start = rng.uniform(0, CANVAS, 2)
        pen.line([*start, *(start + rng.normal(0, 16, 2))], fill=(grey + 60,) * 3, width=2)
    return np.asarray(image.reduce(SCALE)) + rng.normal(0, 4, (RESOLUTION, RESOLUTION, 1))


STYLES = {style.__name__: style for style in (real, painting, clipart, infograph, sketch)}
DOMAINS = tuple(STYLES)


# ------------------------------------------------------------------------------------------- images

BACKDROPS = {
    "real": tuple(BACKGROUNDS),
    "painting": tuple(BACKGROUNDS),
    "clipart": ("white",) * 24 + tuple(COLOURS),  # white in three of four images
    "infograph": ("page",),
    "sketch": ("paper",),
}
BENCHMARK = Difficulty(occlusion=0.12, sensor_noise=8, blur=0.7)
STREAMS = (*SIZES, "web", "captions")  # the last two are those of tools/captions.py


class Attributes(NamedTuple):
    """The contents of an image, in the words that captions use."""

    label: int
    domain: str
    colour: str | None  # None in sketches
    size: str
    position: str
    background: str


def stream(name: str, domain: str, index: int, seed: int) -> Random:
    """Returns the random generator of one image. No two images share a stream."""
    return np.random.default_rng([STREAMS.index(name), DOMAINS.index(domain), index, seed])


def draw(
    split: str, domain: str, index: int, seed: int = 0
) -> tuple[UInt8[np.ndarray, "36 36 3"], Attributes]:
    """Draws an image, always the same one for the same arguments. Its label is `index % 20`."""
    return paint(domain, index % len(CLASSES), BENCHMARK, stream(split, domain, index, seed))


def paint(
    domain: str, label: int, difficulty: Difficulty, rng: Random
) -> tuple[UInt8[np.ndarray, "36 36 3"], Attributes]:
    """Draws an image with random attributes. Returns it and them."""
    size, position, colour, background = (
        pick(rng, tuple(names)) for names in (EXTENTS, POSITIONS, COLOURS, BACKDROPS[domain])
    )
    radius = rng.uniform(*EXTENTS[size]) * CANVAS / 2
    if domain == "infograph":
        radius *= 0.74  # leaves room for the page around it
        offset = 0.13 * CANVAS
        spread = 0.02 * CANVAS
    else:
        offset = 0.75 * max(CANVAS / 2 - 0.95 * radius, 0.1 * CANVAS)
        spread = 0.035 * CANVAS
    centre = CANVAS / 2 + offset * np.array(POSITIONS[position], float) + rng.normal(0, spread, 2)
    angle = math.radians(rng.normal(0, 7.7))
    stretch = math.exp(rng.normal(0, 0.12))
    shear = rng.normal(0, 0.1)
    mirror = rng.choice((-1, 1))
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    pose = radius * turn @ np.array([[mirror * stretch, shear], [0, 1 / stretch]])
    shape = SHAPES[CLASSES[label]](rng)
    parts = [part._replace(outline=part.outline @ pose.T + centre) for part in shape]
    main = np.array(COLOURS[colour], float)
    subject = Subject(parts, centre, radius, main, palette(rng), background, difficulty)
    pixels = np.clip(STYLES[domain](subject, rng), 0, 255).astype(np.uint8)
    named = None if domain == "sketch" else colour
    return pixels, Attributes(label, domain, named, size, position, background)


# ------------------------------------------------------------------------------------------- splits

Images = UInt8[np.ndarray, "images 36 36 3"]
Labels = Int32[np.ndarray, " images"]
# The names of cached files contain a digest of all that determines the images.
VERSIONS = f"numpy {np.__version__}, pillow {PIL.__version__}"
FINGERPRINT = hashlib.sha256(Path(__file__).read_bytes() + VERSIONS.encode()).hexdigest()[:12]


def draw_all(split: str, domain: str, number: int, seed: int = 0) -> tuple[Images, Labels]:
    """Returns the first `number` images and their labels."""
    drawn = [draw(split, domain, index, seed) for index in range(number)]
    labels = [attributes.label for _, attributes in drawn]
    return np.stack([image for image, _ in drawn]), np.array(labels, np.int32)


def load_domain(domain: str, split: str) -> tuple[Images, Labels]:
    """Returns images and labels of a domain's `train`, `val` or `test`.

    Draws them on the first call, or if the cached file is damaged. Raises InputError if the cache
    folder cannot be used.
    """
    number = SIZES[split]
    name = f"{domain}-{split}-{number}"
    path = cache_folder() / "minidomain" / f"{name}-{FINGERPRINT}.npz"
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            # `reshape` finds a damaged header. The CRC finds the rest, but only in whole arrays.
            return arrays["images"].reshape(number, 36, 36, 3), arrays["labels"].reshape(number)
    except FileNotFoundError:
        message = f"drawing {name}, kept in {path}"
    except Exception as error:  # a damaged file may raise anything
        message = f"{path} cannot be read ({error}): drawing it again"
    print("minidomain:", message, file=sys.stderr)

    def write(new: Path) -> None:
        with new.open("wb") as file:
            np.savez(file, images=images, labels=labels)

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        images, labels = draw_all(split, domain, number)
        # Another process may write the same split at this moment, under another name.
        own = path.with_suffix(f".{secrets.token_hex(4)}")
        write_whole(own, write)
        own.replace(path)
    except (OSError, InputError) as error:
        problem = f"{path} cannot be used ({error})"
        raise InputError(f"{problem}: set LIPSUM_CACHE to a writable folder") from error
    return images, labels


def read_minidomain(
    root: Path | None, reference: str, shifts: tuple[str, ...], select_on: str
) -> Data:
    """Returns the embedded benchmark. Raises InputError if a domain is unknown or a root given."""
    if root is not None:
        problem = f"--data minidomain is drawn, not read from --data-root {root}"
        raise InputError(f"{problem}: give --data domainnet")
    shifts = choose_shifts(DOMAINS, reference, shifts)

    def read(name: str, domain: str, split: str) -> Split:
        return Split(name, CLASSES, *load_domain(domain, split))

    reports = {domain: read(domain, domain, "test") for domain in (reference, *shifts)}
    train = read("train", reference, "train")
    return add_selection(train, reports, select_on, lambda: read("val", reference, "val"))
