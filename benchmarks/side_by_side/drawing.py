"""The phases of each side as stacked bars: an SVG that any browser shows, so that no plotting library is needed."""

import statistics
from collections.abc import Sequence
from html import escape

from benchmarks.side_by_side.results import PHASES, Turn

COLOURS = {
    "generate": "#4477aa",
    "score": "#ccbb44",
    "publish": "#aa3377",
    "train": "#228833",
    "other": "#bbbbbb",
}  # Tol's bright scheme, which colour-blind readers can tell apart
WIDTH, LEFT, RIGHT, BAR, GAP = 900, 260, 70, 26, 14


def phases_svg(turns: Sequence[Turn], title: str) -> str:
    """A bar for each side, as long as its step takes; medians over the rounds."""
    names = list(dict.fromkeys(turn.name for turn in turns))
    by_name = {name: [turn for turn in turns if turn.name == name] for name in names}
    seconds = {
        name: {phase: statistics.median(turn.phase(phase) for turn in own) for phase in PHASES}
        for name, own in by_name.items()
    }
    longest = max(sum(each.values()) for each in seconds.values()) or 1.0
    scale = (WIDTH - LEFT - RIGHT) / longest
    height = 70 + len(names) * (BAR + GAP) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif"'
        ' font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="12" y="22" font-size="15">{escape(title)}</text>',
    ]
    for at, phase in enumerate(PHASES):
        key = LEFT + at * 110
        parts.append(f'<rect x="{key}" y="36" width="12" height="12" fill="{COLOURS[phase]}"/>')
        parts.append(f'<text x="{key + 18}" y="47">{phase}</text>')
    for at, name in enumerate(names):
        y, x = 66 + at * (BAR + GAP), float(LEFT)
        parts.append(f'<text x="{LEFT - 8}" y="{y + 18}" text-anchor="end">{escape(name)}</text>')
        for phase in PHASES:
            width = seconds[name][phase] * scale
            told = f"{name}: {phase} {seconds[name][phase]:.3g} s"
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BAR}" fill="{COLOURS[phase]}">'
                f"<title>{escape(told)}</title></rect>"
            )
            x += width
        parts.append(f'<text x="{x + 6:.1f}" y="{y + 18}">{sum(seconds[name].values()):.3g} s</text>')
    parts.append(f'<text x="{LEFT}" y="{height - 10}">seconds a step</text></svg>')
    return "\n".join(parts)
