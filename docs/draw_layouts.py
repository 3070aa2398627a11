"""The pictures of docs/layouts.md, from the configs: ``python -m docs.draw_layouts [LAYOUT …]``.

Each shows where the layers with experts stand, and inside one of them a short row of random tokens that the
layout's own router really routed: whom one of the tokens goes to, who gets the others, what finds no place.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from trainer.config import RunConfig
from trainer.config_moe import DropBy, LayoutConfig, RouterName
from trainer.layouts import EP, drawn_from, layout_config, layout_names
from trainer.models.cost import num_choosable, rank_of_experts
from trainer.models.transformer import is_moe_layer
from trainer.moe.capacity import row_capacity
from trainer.moe.noise import sample_keys
from trainer.moe.positions import Positions
from trainer.moe.router import build_router

FOLDER = Path(__file__).resolve().parent / "images" / "layouts"
WIDTH, HEIGHT, DPI = 700, 400, 150
DIM = 16

INK, GREY, FAINT, PAPER = "#2b2f36", "#6b7480", "#9aa3ad", "#ffffff"
ONE, TOKEN = "#e8590c", "#c3cad2"  # the token that the picture follows, and the others
EXPERT, CHOSEN, SHARED, DENSE = "#d6e4f7", "#6f9fdc", "#b7dfb9", "#e3e3e3"
GREEN = "#5c9a60"
ROUTER, BAND, LOST, NOTHING = "#fbeec2", "#f3f5f7", "#d6336c", "#efe5fb"

LEFT, RIGHT, MIDDLE = 158, 690, 424
TOKENS_Y, ROUTER_Y, RANKS_Y, SLOTS_Y, EXPERTS_Y, COMBINE_Y = 46, 88, 138, 212, 216, 318
EXPERT_HEIGHT, CHIP = 44, 11


@dataclass(frozen=True)
class Row:
    """A routed row: S tokens, K choices each.

    Attributes:
        expert_SK: chosen experts; beyond the choosable ones: none.
        placed_SK: whether the choice found a place.
        weight_SK: combine weights.
        followed: the token that the picture follows.
    """

    expert_SK: list[list[int]]
    placed_SK: list[list[bool]]
    weight_SK: list[list[float]]
    followed: int

    def pairs(self, num: int) -> Iterator[tuple[int, int, bool, float]]:
        """(token, expert, placed, weight) of every choice among the first ``num`` experts."""
        for token, experts in enumerate(self.expert_SK):
            for k, expert in enumerate(experts):
                if expert < num:
                    yield token, expert, self.placed_SK[token][k], self.weight_SK[token][k]

    def served(self, token: int, num: int) -> bool:
        return any(placed for t, _, placed, _ in self.pairs(num) if t == token)


def routed(layout: LayoutConfig, length: int, seed: int) -> Row:
    """What the layout's router, with random weights, does with a row of random tokens in training."""
    generator = torch.Generator().manual_seed(seed)
    router = build_router(DIM, layout, layer=1)
    for parameter in router.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.4
    tokens = torch.randint(0, 50, (1, length), generator=generator)
    keys = sample_keys(torch.tensor([seed]), seed=0)
    x = torch.randn(1, length, DIM, generator=generator)
    with torch.no_grad():
        routing, stats, _ = router.train()(x, Positions(torch.ones(1, length), tokens, keys))
    total, sent_SK = num_choosable(layout), routing.expert_TK
    computed = sent_SK < layout.num_experts
    expert_SK = stats.expert_BSK[0]
    idle = (expert_SK >= layout.num_experts) & (expert_SK < total)
    expert_SK = expert_SK.where(computed | idle, total)  # a second choice left out by chance
    placed = idle | (computed if routing.slot_TK is None else routing.slot_TK >= 0)
    return Row(expert_SK.tolist(), placed.tolist(), routing.weight_TK.tolist(), 0)


def example(layout: LayoutConfig) -> Row:
    """The first row that shows what is particular about the layout."""
    total = num_choosable(layout)
    length = 8 if total <= 12 else 12
    picks = 3 if layout.router is RouterName.expert_choice else layout.top_k
    for seed in range(2000):
        row = routed(layout, length, seed)
        pairs = list(row.pairs(total))
        lost = sum(not placed for _, _, placed, _ in pairs)
        idlers = length - sum(row.served(token, total) for token in range(length))
        by_tokens = layout.router is not RouterName.expert_choice
        if layout.capacity_factor is not None and (lost if by_tokens else idlers) != 1:
            continue
        if max(sum(e == expert for _, e, _, _ in pairs) for expert in range(total)) > 5:
            continue
        for token in range(2, length):
            own = [(expert, placed) for t, expert, placed, _ in pairs if t == token]
            experts = sorted(expert for expert, _ in own)
            apart = all(b - a > 1 for a, b in itertools.pairwise(experts))
            idle = sum(expert >= layout.num_experts for expert in experts)
            wanted = (
                len(own) == picks
                and all(placed for _, placed in own)
                and idle == (total > layout.num_experts)
            )
            inner = range(layout.num_experts // 4, layout.num_experts * 3 // 4)
            if wanted and (apart if layout.num_groups == 1 else all(e in inner for e in experts)):
                return Row(row.expert_SK, row.placed_SK, row.weight_SK, token)
    raise AssertionError(f"no row of {layout.name} shows what it should")


class Picture:
    """One figure in units of pixels at the width it is shown at."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.layout = config, config.layout
        self.figure = Figure(figsize=(WIDTH / 100, HEIGHT / 100), dpi=DPI, facecolor=PAPER)
        self.axes: Axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
        self.axes.axis("off")

    def box(self, x: float, y: float, w: float, h: float, color: str, **style: object) -> None:
        style = {"edgecolor": FAINT, "linewidth": 0.8, "zorder": 3, **style}
        self.axes.add_patch(Rectangle((x, y), w, h, facecolor=color, **style))

    def rounded(self, x: float, y: float, w: float, h: float, color: str, **style: object) -> None:
        style = {"edgecolor": FAINT, "linewidth": 0.8, "zorder": 3, **style}
        shape = "round,pad=0,rounding_size=4"
        self.axes.add_patch(FancyBboxPatch((x, y), w, h, boxstyle=shape, facecolor=color, **style))

    def text(self, x: float, y: float, words: str, size: float = 7.5, **style: object) -> None:
        style = {"ha": "center", "va": "center", "color": INK, "zorder": 6, **style}
        self.axes.text(x, y, words, fontsize=size, **style)

    def arrow(
        self, start: tuple[float, float], end: tuple[float, float], color: str = ONE, **style: object
    ) -> None:
        style = {"linewidth": 1.3, "arrowstyle": "-|>", "mutation_scale": 7, "zorder": 5, **style}
        self.axes.add_patch(
            FancyArrowPatch(start, end, color=color, shrinkA=0, shrinkB=0, **style)  # type: ignore[arg-type]
        )

    def chip(self, x: float, y: float, color: str, size: float = CHIP, **style: object) -> None:
        self.box(x - size / 2, y, size, size, color, **{"edgecolor": PAPER, "linewidth": 0.6, **style})

    def save(self, path: Path) -> None:
        """A small PNG, which knows what it was drawn from."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.figure.savefig(path)
        note = PngInfo()
        note.add_text("Description", drawn_from(self.config))
        with Image.open(path) as image:
            few = image.convert("RGB").quantize(160, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
            few.save(path, optimize=True, pnginfo=note)


def draw_stack(picture: Picture) -> None:
    """The whole model: which blocks are dense and which have experts."""
    config, left, wide = picture.config, 16, 104
    picture.text(left + wide / 2, 388, picture.layout.name, 9, weight="bold")
    picture.text(left + wide / 2, 374, "model=tiny", 7, color=GREY)
    y = 30.0
    picture.rounded(left, y, wide, 16, BAND)
    picture.text(left + wide / 2, y + 8, "embedding", 7)
    y += 22
    zoomed = shown_layer(config)
    for index in range(config.model.num_layers):
        moe = is_moe_layer(config, index)
        picture.rounded(left, y, wide, 16, BAND)
        picture.text(left + wide / 2, y + 8, "attention", 7)
        color = EXPERT if moe else DENSE
        picture.rounded(left, y + 19, wide, 42, color)
        picture.text(left + wide / 2, y + 48, f"layer {index}", 7)
        picture.text(left + wide / 2, y + 33, "experts" if moe else "dense", 9)
        if index == zoomed:
            for a, b in ((y + 19, 24), (y + 61, HEIGHT - 24)):
                picture.axes.plot([left + wide, LEFT - 6], [a, b], color=FAINT, lw=0.8, ls=(0, (3, 2)))
        y += 72
    picture.rounded(left, y, wide, 16, BAND)
    picture.text(left + wide / 2, y + 8, "head", 7)


def shown_layer(config: RunConfig) -> int:
    """The lowest layer with experts, or in a dense model the second."""
    layers = [i for i in range(config.model.num_layers) if is_moe_layer(config, i)]
    return layers[0] if layers else 1


def router_words(layout: LayoutConfig, places: int | None) -> str:
    """What stands in the router's box."""
    score = layout.score.value + (", renormalised" if layout.renormalize else "")
    match layout.router:
        case RouterName.hash:
            return "no gate: a hash of the token's id"
        case RouterName.expert_choice:
            return f"softmax; each expert picks its {places} best tokens of the row"
        case RouterName.sinkhorn:
            return f"{score}; in training balanced over the row by Sinkhorn"
        case RouterName.hierarchical:
            inside = layout.top_k // layout.top_groups
            return f"gate 1: top {layout.top_groups} groups → gate 2: top {inside} in each"
    if layout.logit_norm:
        score = f"normalised logits, {score}"
    if layout.balance.bias_update_rate:
        score = f"{score}, bias for balance"
    return f"{score}, top {layout.top_k}" + (", second by chance" if layout.sample_second else "")


def caption(layout: LayoutConfig, ffn_dim: int) -> str:
    """One line: experts, choices, what is dropped."""
    if not layout.num_experts:
        return f"one feed-forward layer, {ffn_dim} wide, for every token"
    sizes = [(size.num, size.ffn_dim) for size in layout.expert_sizes]
    sizes = sizes or [(layout.num_experts, layout.expert_ffn_dim)]
    parts = [" and ".join(f"{num} experts of {width}" for num, width in sizes)]
    if layout.num_shared_experts:
        parts.append(f"{layout.num_shared_experts} shared of {layout.expert_ffn_dim}")
    if layout.num_zero_experts or layout.num_copy_experts:
        parts.append(f"{layout.num_zero_experts} zero, {layout.num_copy_experts} copy")
    if layout.capacity_factor is None:
        parts.append("dropless")
    else:
        order = ", best scores first" if layout.drop_by is DropBy.score else ""
        parts.append(f"capacity {layout.capacity_factor}{order}")
    return " · ".join(parts)


def frame(picture: Picture, title: str) -> None:
    picture.rounded(LEFT - 6, 24, RIGHT - LEFT + 10, HEIGHT - 48, PAPER, zorder=1)
    picture.text(LEFT + 4, HEIGHT - 36, title, 8, ha="left", weight="bold")
    words = caption(picture.layout, picture.config.model.ffn_dim)
    picture.text(RIGHT - 4, HEIGHT - 36, words, 7.5, ha="right")


def draw_dense(picture: Picture) -> None:
    """A layer that has no experts."""
    frame(picture, "inside a layer")
    wide = 150
    for i in range(8):
        x = MIDDLE + (i - 3.5) * 16
        picture.chip(x, TOKENS_Y, ONE if i == 5 else TOKEN)
        picture.arrow(
            (x, TOKENS_Y + 12), (MIDDLE + (i - 3.5) * 12, 158), ONE if i == 5 else TOKEN, linewidth=0.9
        )
    picture.rounded(MIDDLE - wide / 2, 160, wide, 80, DENSE)
    picture.text(MIDDLE, 200, f"feed-forward\n{picture.config.model.ffn_dim} wide", 9)
    picture.arrow((MIDDLE, 241), (MIDDLE, 330))
    picture.text(MIDDLE, 338, "added to the token", 7.5)
    picture.text(MIDDLE + 76, TOKENS_Y + 6, "8 tokens of a row", 7, ha="left", color=GREY)


@dataclass(frozen=True)
class Shelf:
    """Where each expert stands: left edge and width, by number; those that compute nothing after the real."""

    x: list[float]
    width: list[float]
    shared: tuple[float, float] | None
    scale: float

    def middle(self, expert: int) -> float:
        return self.x[expert] + self.width[expert] / 2


def shelve(layout: LayoutConfig) -> Shelf:
    """Experts to scale, in the order of their ranks, shared ones on the left, idle ones on the right."""
    widths = [size.ffn_dim for size in layout.expert_sizes for _ in range(size.num)]
    widths = widths or [layout.expert_ffn_dim] * layout.num_experts
    ranks = rank_of_experts(layout, EP)
    order = sorted(range(layout.num_experts), key=lambda expert: ranks[expert])
    shared = layout.num_shared_experts * layout.expert_ffn_dim
    num_idle, gap, band, idle_width = num_choosable(layout) - layout.num_experts, 3.0, 9.0, 30.0
    room = RIGHT - LEFT - 12 - gap * len(widths) - band * EP
    room -= (idle_width + 6) * num_idle + 8 * bool(num_idle) + 14 * bool(shared)
    scale = min(52 / 512, room / (sum(widths) + shared))
    total = RIGHT - LEFT - 12 - room + scale * (sum(widths) + shared)
    at = MIDDLE - total / 2 + gap
    place = None
    if shared:
        place, at = (at, shared * scale), at + shared * scale + 14
    x, last = [0.0] * len(widths), 0
    for expert in order:
        at += band if ranks[expert] != last else 0
        last = ranks[expert]
        x[expert], at = at, at + widths[expert] * scale + gap
    at += band + 8
    for _ in range(num_idle):
        x.append(at)
        at += idle_width + 6
    return Shelf(x, [w * scale for w in widths] + [idle_width] * num_idle, place, scale)


def draw_ranks(picture: Picture, shelf: Shelf, chosen: Mapping[int, float], crossed: list[float]) -> None:
    """Bands behind the experts: ranks, and groups where there are any.

    Args:
        crossed: where arrows pass at the height of the words, which keep away from them.
    """
    layout, ranks = picture.layout, rank_of_experts(picture.layout, EP)
    for rank in range(EP):
        mine = [e for e in range(layout.num_experts) if ranks[e] == rank]
        left = min(shelf.x[e] for e in mine) - 4
        right = max(shelf.x[e] + shelf.width[e] for e in mine) + 4
        groups = {e * layout.num_groups // layout.num_experts for e in mine}
        grouped = layout.num_groups > 1
        hit = grouped and any(e in chosen for e in mine)
        edge = {"edgecolor": ONE, "linewidth": 1.0, "linestyle": (0, (3, 2))} if hit else {"edgecolor": BAND}
        picture.rounded(left, 130, right - left, 150, BAND, zorder=2, **edge)
        if grouped and len(groups) == 1:
            at, side = (left + 2, "left") if right < MIDDLE + 5 else (right - 2, "right")
            picture.text(at, 287, f"group {groups.pop()}", 6.5, color=GREY, ha=side)
        half = 20
        places = [(left + right) / 2, left + half, right - half]
        x = max(places, key=lambda at: min([half + 3, *(abs(at - c) for c in crossed)]))
        picture.text(x, RANKS_Y, f"rank {rank}", 6.5, color=GREY)


def draw_experts(picture: Picture, shelf: Shelf, chosen: Mapping[int, float]) -> None:
    layout = picture.layout
    numbered = layout.num_experts <= 16
    for expert in range(layout.num_experts):
        color = CHOSEN if expert in chosen else EXPERT
        picture.box(
            shelf.x[expert], EXPERTS_Y, shelf.width[expert], EXPERT_HEIGHT, color, edgecolor="#7d8fa8"
        )
        if numbered:
            picture.text(shelf.middle(expert), EXPERTS_Y + EXPERT_HEIGHT / 2, str(expert), 7.5)
    for expert in range(layout.num_experts, num_choosable(layout)):
        zero = expert < layout.num_experts + layout.num_zero_experts
        style = {
            "edgecolor": CHOSEN if expert in chosen else FAINT,
            "linestyle": (0, (3, 2)),
            "linewidth": 1.2,
        }
        color = PAPER if zero else NOTHING
        picture.box(shelf.x[expert], EXPERTS_Y, shelf.width[expert], EXPERT_HEIGHT, color, **style)
        picture.text(shelf.middle(expert), EXPERTS_Y + EXPERT_HEIGHT / 2, "zero" if zero else "copy", 7)
    if shelf.shared:
        x, width = shelf.shared
        picture.box(x, EXPERTS_Y, width, EXPERT_HEIGHT, SHARED, edgecolor=GREEN)
        picture.text(x + width / 2, EXPERTS_Y + EXPERT_HEIGHT + 8, "shared", 6.5, color=GREEN)


def draw_places(picture: Picture, shelf: Shelf, row: Row, places: int | None) -> dict[int, float]:
    """Each expert's tokens hang below it, with a capacity in its places. Where the followed token's chips end."""
    total = num_choosable(picture.layout)
    ends: dict[int, float] = {}
    for expert in range(total):
        size = min(CHIP, shelf.width[expert])
        x, filled, over = shelf.middle(expert), 0, 0
        capacity = places if expert < picture.layout.num_experts else None
        for place in range(capacity or 0):
            empty = {"edgecolor": FAINT, "linewidth": 0.7}
            picture.chip(x, SLOTS_Y - (place + 1) * size + 1, PAPER, size - 1, **empty)
        mine = [(t, placed) for t, e, placed, _ in row.pairs(total) if e == expert]
        for token, placed in sorted(mine, key=lambda pair: not pair[1]):
            if placed:
                filled += 1
                y = SLOTS_Y - filled * size + 1
                picture.chip(x, y, ONE if token == row.followed else TOKEN, size - 1, zorder=4)
                if token == row.followed:
                    ends[expert] = y
            elif capacity is not None:
                over += 1
                y = SLOTS_Y - (capacity + over) * size - 2
                picture.chip(x, y, PAPER, size - 1, zorder=4, edgecolor=LOST, linewidth=1.1)
                picture.text(x, y + size / 2 - 0.5, "×", 7, color=LOST)
        deepest = max(filled, capacity or 0)
        if expert in ends:
            ends[expert] = SLOTS_Y - deepest * size - (size + 2) * over
    return ends


def draw_moe(picture: Picture) -> None:
    """A layer with experts, from the row of tokens at the bottom to the sum at the top."""
    layout = picture.layout
    row, shelf, total = example(layout), shelve(layout), num_choosable(layout)
    places = row_capacity(layout, len(row.expert_SK))
    mine = {expert: weight for t, expert, placed, weight in row.pairs(total) if t == row.followed and placed}
    frame(picture, f"inside layer {shown_layer(picture.config)}")
    ends = draw_places(picture, shelf, row, places)
    crossed = draw_choices(picture, shelf, mine, ends)
    draw_ranks(picture, shelf, mine, crossed)
    draw_experts(picture, shelf, mine)
    picture.rounded(MIDDLE - 150, ROUTER_Y, 300, 20, ROUTER)
    picture.text(MIDDLE, ROUTER_Y + 10, router_words(layout, places), 7.5)
    first, last = draw_tokens(picture, row)
    words, half = "weighted sum of the answers", 84
    if shelf.shared:
        words, half = f"{words} + shared", 108
        x = shelf.shared[0] + shelf.shared[1] / 2
        bend = {"connectionstyle": "arc3,rad=-0.16", "color": GREEN}
        picture.axes.plot([first, last], [TOKENS_Y - 4] * 2, color=GREEN, lw=1.3, zorder=5)
        picture.arrow((first, TOKENS_Y - 4), (x, EXPERTS_Y - 1), **bend)
        picture.arrow((x, EXPERTS_Y + EXPERT_HEIGHT + 14), (MIDDLE - half, COMBINE_Y + 8), **bend)
    picture.rounded(MIDDLE - half, COMBINE_Y, 2 * half, 18, PAPER)
    picture.text(MIDDLE, COMBINE_Y + 9, words, 7.5)
    draw_ruler(picture, shelf)


def draw_tokens(picture: Picture, row: Row) -> tuple[float, float]:
    """The row of tokens on its way to the router; where it begins and ends."""
    length, total = len(row.expert_SK), num_choosable(picture.layout)
    left, right = (MIDDLE + side * (length - 1) / 2 * 17 for side in (-1, 1))
    for token in range(length):
        x, own = left + 17 * token, token == row.followed
        lost = {} if row.served(token, total) else {"edgecolor": LOST, "linewidth": 1.2}
        picture.chip(x, TOKENS_Y, ONE if own else TOKEN, 12, **lost)
        style = {"linewidth": 1.3 if own else 0.7, "zorder": 5 if own else 4}
        picture.arrow((x, TOKENS_Y + 13), (x, ROUTER_Y - 1), ONE if own else TOKEN, **style)
    picture.text(right + 16, TOKENS_Y + 6, f"{length} tokens of a row", 7, ha="left", color=GREY)
    return left - 8, right + 8


def draw_choices(
    picture: Picture, shelf: Shelf, mine: Mapping[int, float], ends: Mapping[int, float]
) -> list[float]:
    """Arrows from the router to the followed token's experts and from those to the sum, as thick as the weight.

    Returns:
        Where the first ones are at the height of the ranks' names.
    """
    layout, labelled = picture.layout, len(mine) <= 4
    zeros = range(layout.num_experts, layout.num_experts + layout.num_zero_experts)
    crossed = []
    for order, expert in enumerate(sorted(mine, key=shelf.middle)):
        x, aside = shelf.middle(expert), order - (len(mine) - 1) / 2
        start, end = (MIDDLE + aside * 30, ROUTER_Y + 20.0), (x, ends[expert] - 1)
        style = {"linewidth": 0.8 + 1.6 * min(1.0, mine[expert])}
        picture.arrow(start, end, **style)
        crossed.append(start[0] + (end[0] - start[0]) * (RANKS_Y - start[1]) / (end[1] - start[1]))
        top = EXPERTS_Y + EXPERT_HEIGHT
        if labelled:
            picture.text(x, top + 7, f"{mine[expert]:.2f}", 6.5, color=ONE)
        if expert not in zeros:
            picture.arrow((x, top + 13 * labelled), (MIDDLE + aside * 22, COMBINE_Y - 1), **style)
    return crossed


def draw_ruler(picture: Picture, shelf: Shelf) -> None:
    """How wide a dense layer would be at the scale of the experts."""
    wide, y = picture.config.model.ffn_dim * shelf.scale, 347
    x = RIGHT - 8 - wide
    picture.axes.plot([x, x + wide], [y, y], color=INK, lw=1.2, marker="|", ms=5)
    picture.text(x - 6, y, f"{picture.config.model.ffn_dim}, as wide as a dense layer", 6.5, ha="right")


def draw_legend(picture: Picture) -> None:
    """What the colours mean, only those that occur."""
    layout = picture.layout
    items = [(ONE, "token followed", {}), (TOKEN, "other tokens", {})]
    if layout.num_experts:
        items += [(CHOSEN, "its experts", {}), (EXPERT, "other experts", {})]
    if layout.num_shared_experts:
        items.append((SHARED, "shared: every token", {}))
    if layout.router is RouterName.expert_choice:
        items.append((TOKEN, "picked by none", {"edgecolor": LOST, "linewidth": 1.2}))
    elif layout.capacity_factor is not None:
        items.append((PAPER, "empty place", {"edgecolor": FAINT}))
        items.append((PAPER, "dropped", {"edgecolor": LOST, "linewidth": 1.2}))
    x = float(LEFT - 6)
    for color, words, style in items:
        picture.chip(x + 5, 8, color, 9, **style)
        picture.text(x + 13, 12.5, words, 7, ha="left")
        x += 30 + 4.7 * len(words)


def draw(name: str, folder: Path = FOLDER) -> Path:
    """Draw one layout; returns the picture's path."""
    picture = Picture(layout_config(name))
    draw_stack(picture)
    inside: Callable[[Picture], None] = draw_moe if picture.layout.num_experts else draw_dense
    inside(picture)
    draw_legend(picture)
    path = folder / f"{name}.png"
    picture.save(path)
    return path


if __name__ == "__main__":
    torch.set_num_threads(1)
    for chosen in sys.argv[1:] or layout_names():
        print(draw(chosen))
