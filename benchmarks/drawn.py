"""Outliers that are drawn by formulas: small images of several kinds, one file for each.

The panel by which weights and scores were chosen has no letters, symbols, charts, signs, gratings,
clouds, fractals or codes. So these show what a choice is worth on kinds that it was not made for.
When "three_views" was made, these eight were known. Five more were drawn after that (``--later``).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from images import count
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.random import RandomState
from numpy.typing import NDArray

SIDE = 32
"""Pixels of a side."""

SCALE = 2
"""Pixels drawn for each that is kept, in each direction."""

FONTS = ("DejaVu Sans", "DejaVu Serif", "DejaVu Sans Mono")
LETTERS = "ABCDEFGHKMNQRSTWXYZabdeghkqrt"
SYMBOLS = "∑∫√∞≠±Ωβψλжюд♠♣♥÷"
MARKS = "!?↑→P50STX"
STEPS = 40
"""Steps after which a point that has not escaped counts as one of the Mandelbrot set."""

Image = NDArray[np.uint8]


def main(argv: Sequence[str] | None = None) -> None:
    """Draw each kind into a file of its own."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=count, default=300, help="of each kind (default: 300)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--later", action="store_true", help="the five kinds drawn later")
    parser.add_argument("--folder", type=Path, required=True, help="for NAME.npz of each kind")
    options = parser.parse_args(argv)
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, draw in (LATER if options.later else KINDS).items():
        random = RandomState(options.seed)
        images = np.stack([draw(random) for _ in range(options.rows)])
        np.savez_compressed(options.folder / f"{name}.npz", x=images)


def letter(random: RandomState) -> Image:
    """A letter, in one colour on another."""
    return glyph(LETTERS, random)


def symbol(random: RandomState) -> Image:
    """A symbol of mathematics, cards or another alphabet."""
    return glyph(SYMBOLS, random)


def glyph(characters: str, random: RandomState) -> Image:
    ground = random.rand(3)
    ink = (ground + random.uniform(0.3, 0.7, 3)) % 1

    def onto(figure: Figure) -> None:
        write(figure, random.choice(list(characters)), random, ink, (20, 32))

    return painted(onto, ground)


def chart(random: RandomState) -> Image:
    """Lines, bars, points or a cake."""

    def onto(figure: Figure) -> None:
        axes = figure.add_axes((0.06, 0.06, 0.88, 0.88), xticks=[], yticks=[])
        kind = random.randint(4)
        if kind == 0:
            axes.plot(random.randn(20).cumsum(), color=random.rand(3))
        elif kind == 1:
            axes.bar(range(6), random.rand(6), color=random.rand(6, 3))
        elif kind == 2:
            axes.scatter(random.rand(15), random.rand(15), c=random.rand(15, 3), s=8)
        else:
            axes.pie(random.rand(4) + 0.1, colors=random.rand(4, 3))

    return painted(onto, np.ones(3))


def sign(random: RandomState) -> Image:
    """A mark on a plate, as beside a road."""

    def onto(figure: Figure) -> None:
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 1), ylim=(0, 1))
        axes.axis("off")
        corners = random.choice([3, 4, 8, 60])
        angles = np.linspace(0, 2 * np.pi, corners, endpoint=False)
        angles += random.choice([0, np.pi / corners, np.pi / 2])
        radius = random.uniform(0.3, 0.45)
        plate = random.choice(["red", "blue", "gold", "white", "green"])
        axes.fill(
            0.5 + radius * np.cos(angles),
            0.5 + radius * np.sin(angles),
            facecolor=plate,
            edgecolor=random.choice(["red", "black", "white"]),
            linewidth=2,
        )
        ink = "black" if plate in ("gold", "white") else "white"
        write(figure, random.choice(list(MARKS)), random, ink, (10, 14))

    return painted(onto, random.rand(3))


def grating(random: RandomState) -> Image:
    """Waves in one direction, between two colours."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    angle, frequency = random.uniform(0, np.pi), random.uniform(0.1, 1.2)
    along = np.cos(angle) * rows + np.sin(angle) * columns
    wave = (np.sin(frequency * along + random.uniform(0, 2 * np.pi)) + 1) / 2
    first, second = random.rand(2, 3)
    return as_image(first + wave[..., None] * (second - first))


def cloud(random: RandomState) -> Image:
    """Noise whose spectrum falls with the frequency, as that of photographs does."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(SIDE), np.fft.fftfreq(SIDE)))
    frequency[0, 0] = 1
    falling = frequency[..., None] ** random.uniform(0.8, 2)
    spectrum = np.fft.fft2(random.randn(SIDE, SIDE, 3), axes=(0, 1)) / falling
    values = np.fft.ifft2(spectrum, axes=(0, 1)).real
    return as_image((values - values.min()) / np.ptp(values))


def fractal(random: RandomState) -> Image:
    """A detail of the Mandelbrot set."""
    axis = random.uniform(0.05, 0.6) * np.linspace(-1, 1, SIDE)
    start = random.uniform(-1.5, 0.3) + 1j * random.uniform(-0.9, 0.9)
    points = start + axis + 1j * axis[:, None]
    values, steps = np.zeros_like(points), np.zeros(points.shape)
    for _ in range(STEPS):
        inside = np.abs(values) <= 2
        values[inside] = values[inside] ** 2 + points[inside]
        steps += inside
    colours = matplotlib.colormaps[random.choice(["viridis", "magma", "twilight", "jet"])]
    return as_image(colours(steps / STEPS)[..., :3])


def code(random: RandomState) -> Image:
    """Squares of two colours at random, as in a printed code."""
    squares = random.choice([8, 16])
    bits = random.randint(2, size=(squares, squares))
    bits = np.kron(bits, np.ones((SIDE // squares, SIDE // squares)))[..., None]
    dark, light = random.uniform(0, 0.35, 3), random.uniform(0.65, 1, 3)
    return as_image(dark + bits * (light - dark))


def maze(random: RandomState) -> Image:
    """Walls of a maze, one pixel or two wide."""
    width = random.randint(1, 3)
    cells = SIDE // width // 2
    walls = np.ones((2 * cells + 1, 2 * cells + 1))
    path, seen = [(0, 0)], {(0, 0)}
    walls[1, 1] = 0
    while path:
        row, column = path[-1]
        beside = [(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)]
        new = [
            (r, c) for r, c in beside if (r, c) not in seen and 0 <= min(r, c) <= max(r, c) < cells
        ]
        if not new:
            path.pop()
            continue
        r, c = new[random.randint(len(new))]
        walls[row + r + 1, column + c + 1] = walls[2 * r + 1, 2 * c + 1] = 0
        seen.add((r, c))
        path.append((r, c))
    walls = np.kron(walls, np.ones((width, width)))[:SIDE, :SIDE, None]
    floor, wall = random.rand(2, 3)
    return as_image(floor + np.pad(walls, [(0, SIDE - len(walls))] * 2 + [(0, 0)]) * (wall - floor))


def paragraph(random: RandomState) -> Image:
    """Lines of words, as on a page that was scanned."""
    paper, ink = random.uniform(0.75, 1, 3), random.uniform(0, 0.35, 3)
    size, family = random.uniform(3, 6), random.choice(FONTS)

    def onto(figure: Figure) -> None:
        letters = list("abcdefghijklmnopqrstuvwxyz    ,.")
        for line in range(int(48 / size)):
            text = "".join(random.choice(letters, 40))
            figure.text(-0.05, 0.95 - line * size / 40, text, color=ink, size=size, family=family)

    return painted(onto, paper)


def ball(random: RandomState) -> Image:
    """A ball with light from one side, before a wall."""
    rows, columns = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]
    (x, y), radius = random.uniform(-0.3, 0.3, 2), random.uniform(0.35, 0.8)
    height = 1 - ((rows - x) ** 2 + (columns - y) ** 2) / radius**2
    light = random.randn(3)
    light[2] = abs(light[2]) + 0.3
    normal = np.stack(
        [(rows - x) / radius, (columns - y) / radius, np.sqrt(height.clip(0))], axis=-1
    )
    shade = (normal @ (light / np.linalg.norm(light))).clip(0.1)[..., None]
    wall = random.rand(3) * (1 + 0.3 * rows[..., None])
    return as_image(np.where(height[..., None] > 0, random.rand(3) * shade, wall).clip(0, 1))


def mosaic(random: RandomState) -> Image:
    """Tiles of the colours nearest to random points."""
    points = random.uniform(0, SIDE, (random.randint(8, 60), 2))
    colours = random.rand(len(points), 3)
    places = np.stack(np.mgrid[:SIDE, :SIDE], axis=-1)[:, :, None]
    return as_image(colours[((places - points) ** 2).sum(axis=-1).argmin(axis=-1)])


def plasma(random: RandomState) -> Image:
    """Waves of many directions, in the colours of a rainbow."""
    rows, columns = np.mgrid[:SIDE, :SIDE] / SIDE
    waves = random.randn(5, 2) * random.uniform(3, 15)
    phases = random.uniform(0, 2 * np.pi, 5)
    total = sum(np.sin(a * rows + b * columns + p) for (a, b), p in zip(waves, phases, strict=True))
    return as_image((np.sin(total[..., None] + np.array([0, 2, 4])) + 1) / 2)


KINDS: dict[str, Callable[[RandomState], Image]] = {
    "letters": letter,
    "symbols": symbol,
    "charts": chart,
    "signs": sign,
    "gratings": grating,
    "clouds": cloud,
    "fractals": fractal,
    "codes": code,
}

LATER: dict[str, Callable[[RandomState], Image]] = {
    "mazes": maze,
    "paragraphs": paragraph,
    "balls": ball,
    "mosaics": mosaic,
    "plasmas": plasma,
}


def painted(onto: Callable[[Figure], None], ground: NDArray[np.float64]) -> Image:
    """What is drawn onto a ground, larger, and made smaller by means."""
    side = SCALE * SIDE
    figure = Figure(figsize=(side / 100, side / 100), dpi=100, facecolor=tuple(ground))
    canvas = FigureCanvasAgg(figure)
    onto(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3] / 255
    return as_image(pixels.reshape(SIDE, SCALE, SIDE, SCALE, 3).mean(axis=(1, 3)))


def write(figure: Figure, text: str, random: RandomState, ink: Any, sizes: tuple[int, int]) -> None:
    figure.text(
        0.5,
        0.5,
        text,
        color=ink,
        size=random.randint(*sizes),
        rotation=random.randint(-20, 20),
        family=random.choice(FONTS),
        horizontalalignment="center",
        verticalalignment="center",
    )


def as_image(values: NDArray[np.float64]) -> Image:
    """Values from 0 to 1 as bytes."""
    return np.round(255 * values).astype(np.uint8)


if __name__ == "__main__":
    main()
