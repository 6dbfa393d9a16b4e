"""Figures of a crowded set of results: no text lies on another or on a point, and what a figure
compares differs in grey too.

Run them with `python -m pytest tests/commands/test_figures.py`.
"""

import itertools
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import lipsum
from support.report import tables
from support.report.labels import describe_method

matplotlib = pytest.importorskip("matplotlib")
figures = pytest.importorskip("support.report.figures")

from matplotlib import colors  # noqa: E402
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.text import Text  # noqa: E402
from matplotlib.transforms import BboxBase  # noqa: E402

SPLITS = ("real", "painting", "clipart", "infograph", "sketch")
SETTINGS = {"steps": 250, "learning_rate": 0.001, "weight": 1.0, "decay": 0.99}


def result(method: str, seed: int, accuracy: float, gap: float, **more: object) -> tables.Results:
    """A run with an accuracy on the shifts, an energy gap there, and an accuracy of 75 to 80 % on
    the reference.
    """

    def splits(accuracy: float, gap: float) -> dict[str, dict[str, object]]:
        return {
            name: {
                "role": "shift" if index else "reference",
                "accuracy": accuracy if index else 0.75 + (37 * accuracy) % 0.05,
                "energy_gap": gap * (1 + index),
                "distortion": gap**0.5 * (1 + index / 5),
            }
            for index, name in enumerate(SPLITS)
        }

    content = {"method": method, "seed": seed, "settings": SETTINGS, **describe_method(method)}
    return content | {"splits": splits(accuracy, gap), "zero_shot": splits(0.85, 0.0)} | more


def crowded() -> Iterable[tables.Results]:
    """Three seeds of 13 methods within a few points, sweeps of two settings, and all post-hoc
    methods.
    """
    random = np.random.default_rng(0)
    methods = [method for method in lipsum.METHODS if method != "zero-shot"]
    for seed, method in itertools.product(range(3), methods):
        yield result(method, seed, 0.8 + random.normal() / 50, 0.002 * np.exp(random.normal()))
    assert len(methods) == 13
    for method, steps, rate in itertools.product(
        ("ft", "lipsum", "kd"), (100, 250), (0.0003, 0.003, 0.01)
    ):
        settings = SETTINGS | {"steps": steps, "learning_rate": rate}
        yield result(method, 0, 0.82 - 10 * rate + random.normal() / 200, rate, settings=settings)
    for method in ("ft", "lipsum"):
        for alpha in (0.9, 0.7, 0.5):
            yield result(
                f"{method}+wise-{alpha}", 0, 0.85 - 0.05 * alpha, 0.001, post_hoc={"alpha": alpha}
            )
            yield result(
                f"{method}+tpgm-c-{alpha}",
                0,
                0.84 - 0.03 * alpha,
                0.001,
                post_hoc={"penalty": alpha},
            )
        for kind in ("tpgm", "soup", "ensemble"):
            yield result(
                f"{method}+{kind}", 0, 0.8 + random.normal() / 200, 0.001, post_hoc={"penalty": 0.0}
            )


def weights() -> Iterable[tables.Results]:
    """FT, and four values of lambda, or of EMA's decay, for the others."""
    yield result("ft", 0, 0.75, 0.002)
    for method, value in itertools.product(
        ("lipsum", "l2sp", "kd", "car-ft", "ema"), (0.1, 0.3, 0.9, 0.99)
    ):
        settings = SETTINGS | {"decay" if method == "ema" else "weight": value}
        yield result(method, 0, 0.76 + value / 20 + len(method) / 200, 0.001, settings=settings)


def contains(outer: BboxBase, inner: BboxBase) -> bool:
    return (
        outer.x0 <= inner.x0
        and inner.x1 <= outer.x1
        and outer.y0 <= inner.y0
        and inner.y1 <= outer.y1
    )


def check_texts(figure: Figure, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Returns all drawn texts, which are inside the figure.

    Straight ones do not overlap. Labels are inside their axes and on no point.
    """
    boxes: dict[Text, BboxBase] = {}
    draw = Text.draw

    def recorded(text: Text, renderer: RendererAgg) -> None:
        if text.get_text() and text.get_visible():
            boxes[text] = Text.get_window_extent(text, renderer).padded(-0.5)
        draw(text, renderer)

    with monkeypatch.context() as patched:
        patched.setattr(Text, "draw", recorded)
        FigureCanvasAgg(figure).draw()
    assert all(contains(figure.bbox, box) for box in boxes.values())
    straight = [text for text in boxes if text.get_rotation() % 90 == 0]
    for one, other in itertools.combinations(straight, 2):
        assert not boxes[one].overlaps(boxes[other]), f"{one} lies on {other}"
    for axes in filter(figures.Axes.get_visible, figure.axes):
        marked = [line.get_xydata() for line in axes.lines if line.get_marker() != "None"]
        points = axes.transData.transform(np.concatenate(marked)) if marked else []
        for text in axes.texts:
            assert contains(axes.bbox, boxes[text]), f"{text} leaves its axes"
            assert not any(boxes[text].contains(*point) for point in points), f"{text} on a point"
    return {text.get_text() for text in boxes}


@pytest.mark.parametrize("name", figures.FROM_FILES)
def test_no_text_lies_on_another(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zero-shot, FT and Lipsum-FT are named in each panel; the trade-off and the distortion name
    all methods. Labels have the same places every time.
    """
    results = list(weights() if name == "weights" else crowded())
    draw, _ = figures.FROM_FILES[name]
    figure, again = draw(results), draw(results)
    texts = check_texts(figure, monkeypatch)
    all_methods = {method.label for method in lipsum.METHODS.values()}
    if name == "distortion":
        assert all_methods - {"zero-shot"} <= texts
    else:
        for axes, same in zip(figure.axes, again.axes, strict=True):
            labels = [(text.get_text(), *text.get_position()) for text in axes.texts]
            assert labels == [(text.get_text(), *text.get_position()) for text in same.texts]
            named = {label[0] for label in labels}
            assert {"zero-shot", "FT", "Lipsum-FT"} <= named
            assert name != "trade_off" or all_methods <= named
    if name == "post_hoc_curves":
        assert {"FT + WiSE 0.5", "Lipsum-FT + TPGM-C 0.9", "FT + TPGM"} <= texts
    if name == "weights":
        assert {"EMA, by decay", "KD, by weight", "0.1", "0.99"} <= texts


def test_lines_join_runs_that_differ_in_one_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line per number of steps, over the learning rates; the texts at its ends and its middle say
    which.
    """
    runs = []
    for steps, rate in itertools.product((100, 250), (0.0003, 0.001, 0.003)):
        settings = SETTINGS | {"steps": steps, "learning_rate": rate}
        runs.append(result("ft", 0, 0.7 + 20 * rate + steps / 1e4, 0.001, settings=settings))
    figure = figures.draw_trade_off(runs)
    marked = [line for line in figure.axes[0].get_lines() if line.get_marker() != "None"]
    on_shifts = [np.round(line.get_xdata(), 6).tolist() for line in marked]
    assert on_shifts == [[71.6, 73.0, 77.0], [73.1, 74.5, 78.5], [85.0]]
    texts = check_texts(figure, monkeypatch)
    expected = {
        "at the ends of lines: learning rate",
        "steps 100",
        "steps 250",
        "0.0003",
        "0.003",
        "FT",
        "zero-shot",
    }
    assert expected <= texts and "0.001" not in texts


def test_what_runs_without_shifts_lack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only the distortion is drawn."""
    run = result("ft", 0, 0.7, 0.001)
    run |= {kind: {"real": run[kind]["real"]} for kind in ("splits", "zero_shot")}
    drawn = {
        name: (partial(draw, [run]), need) for name, (draw, need) in figures.FROM_FILES.items()
    }
    figures.write_figures(drawn, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"distortion.png", "distortion.svg"}
    lines = capsys.readouterr().out.splitlines()
    assert sum("nothing to show yet, it needs" in line for line in lines) == len(drawn) - 1
    assert all("with shifts" in line for line in lines if "nothing to show" in line)


def test_post_hoc_curves_are_in_the_order_of_their_setting() -> None:
    """WiSE from the fine-tuned run downwards, TPGM-C by rising penalty, whatever the order of the
    runs.
    """
    runs = [result("ft", 0, 0.7, 0.001)]
    runs += [
        result(f"ft+wise-{a}", 0, 0.8 - a / 10, 0.001, post_hoc={"alpha": a})
        for a in (0.5, 0.9, 0.7)
    ]
    runs += [
        result(f"ft+tpgm-c-{p}", 0, 0.8 + p / 100, 0.001, post_hoc={"penalty": p})
        for p in (10.0, 0.5, 2.0)
    ]
    on_shifts = {
        line.get_linestyle(): np.round(line.get_xdata(), 6).tolist()
        for line in figures.draw_post_hoc_curves(runs).axes[0].get_lines()
        if len(line.get_xdata()) > 1 and line.get_marker() != "None"
    }
    assert on_shifts == {"-": [70.0, 71.0, 73.0, 75.0], "--": [80.5, 82.0, 90.0]}


def test_names_of_clouds_do_not_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Energy vectors: every panel has its method's name and, beside the clouds, the splits'."""
    random = np.random.default_rng(0)
    before = {name: random.normal(size=(20, 4)) + 3 * random.normal(size=4) for name in SPLITS}
    moved = {name: each + 0.1 for name, each in before.items()}
    after = dict.fromkeys(("ft", "lipsum", "kd"), moved)
    figure = figures.draw_energy_vectors(before, after, np.eye(4))
    assert {"FT", "Lipsum-FT", "KD"} <= check_texts(figure, monkeypatch)
    for axes in figure.axes[: len(after)]:
        assert {text.get_text() for text in axes.texts} == set(SPLITS)


def test_distortion_has_a_panel_per_model() -> None:
    """Figures 9 to 12: with one axis for all, and each model's own methods."""
    runs = []
    for number, model in enumerate(("ViT-B/32", "ViT-L/14")):
        settings = SETTINGS | {"model": model, "templates": "openai"}
        methods = ("ft", "lp-ft")[: number + 1]
        runs += [result(method, 0, 0.8, 0.01, settings=settings) for method in methods]
    figure = figures.draw_distortion(runs)
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in panels] == ["model ViT-B/32", "model ViT-L/14"]
    names = [[text.get_text() for text in axes.get_xticklabels()] for axes in panels]
    assert names == [["FT"], ["FT", "LP-FT"]]
    assert panels[0].get_ylim() == panels[1].get_ylim()


def test_looks_differ_in_grey_and_in_marker() -> None:
    """Grey by Rec. 601, as printers and Pillow convert it."""
    looks = [figures.look_of(method) for method in ("zero-shot", "lipsum", "ft", "kd")]
    greys = [np.dot(colors.to_rgb(look["color"]), (0.299, 0.587, 0.114)) for look in looks]
    assert np.diff(greys).min() > 0.2 and greys[-1] < 0.75
    assert len({look["marker"] for look in looks[:3]}) == 3
    others = {
        name for name in lipsum.METHODS if figures.look_of(name)["color"] == looks[-1]["color"]
    }
    assert lipsum.METHODS.keys() - others == {"zero-shot", "ft", "lipsum"}
    assert figures.look_of("ft+wise-0.5")["markerfacecolor"] == "none"
