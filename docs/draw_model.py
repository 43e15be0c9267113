"""Draws ``docs/images/model.svg``: the model, what each training loop learns of it, and the files that hold the parts.

python docs/draw_model.py
"""

from __future__ import annotations

import math
from html import escape
from pathlib import Path

WIDTH, HEIGHT = 1120, 470
INK, SOFT, LINE = "#1f2933", "#52606d", "#9aa5b1"
FILLS = {"sound": "#e8f1fb", "encoder": "#cfe3f7", "projector": "#fbe5c8", "language": "#dcefdc", "loop": "#f5f7fa"}


def text(
    x: float, y: float, words: str, size: int = 14, colour: str = INK, anchor: str = "middle", bold: bool = False
) -> str:
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{colour}" text-anchor="{anchor}"{weight}>'
        f"{escape(words)}</text>"
    )


def box(
    x: float, y: float, width: float, height: float, fill: str, title: str, lines: tuple[str, ...], file: str
) -> str:
    middle = x + width / 2
    parts = [f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="{fill}" stroke="{LINE}"/>']
    parts.append(text(middle, y + 26, title, 16, bold=True))
    parts += [text(middle, y + 48 + 18 * number, line, 13, SOFT) for number, line in enumerate(lines)]
    parts.append(text(middle, y + height - 10, file, 12, SOFT))
    return "".join(parts)


def arrow(x1: float, y1: float, x2: float, y2: float, dashed: bool = False) -> str:
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    place = f'x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"'
    return f'<line {place} stroke="{INK}" stroke-width="1.6"{dash} marker-end="url(#tip)"/>'


def wave(x: float, y: float, width: float, height: float, phase: float) -> str:
    steps = 90
    points = []
    for step in range(steps + 1):
        share = step / steps
        level = math.sin(math.pi * share) ** 2 * (0.6 + 0.4 * math.sin(5 * share + phase))
        value = level * math.sin(46 * share + phase)
        points.append(f"{x + share * width:.1f},{y - value * height / 2:.1f}")
    return f'<polyline points="{" ".join(points)}" fill="none" stroke="#2b6cb0" stroke-width="1.4"/>'


def squares(x: float, y: float, count: int, fill: str) -> str:
    return "".join(
        f'<rect x="{x + 15 * number}" y="{y}" width="12" height="12" rx="2" fill="{fill}" stroke="{LINE}"/>'
        for number in range(count)
    )


def picture() -> str:
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="system-ui, sans-serif" '
        'role="img" aria-label="Sound goes through an encoder and a Q-Former into a language model that answers">',
        '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 L10 5 L0 10 z" fill="{INK}"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    # the sound
    parts.append(f'<rect x="20" y="70" width="150" height="130" rx="8" fill="{FILLS["sound"]}" stroke="{LINE}"/>')
    parts += [wave(32, 122, 126, 36, 0.0), wave(32, 156, 126, 36, 0.9)]
    parts += [text(95, 92, "1, 2 or 4 channels", 13, SOFT), text(95, 190, "audio.py, shards/", 12, SOFT)]
    # encoder, projector, language model
    parts.append(
        box(
            220,
            70,
            190,
            130,
            FILLS["encoder"],
            "audio encoder",
            ("windows (C, T)", "to n tokens each"),
            "model/encoder.py",
        )
    )
    parts.append(
        box(
            460,
            70,
            190,
            130,
            FILLS["projector"],
            "Q-Former",
            ("learnt queries: so many", "embeddings a window"),
            "model/projector.py",
        )
    )
    parts.append(
        box(
            800,
            40,
            300,
            190,
            FILLS["language"],
            "language model + LoRA",
            ("Qwen, Llama, SmolLM …",),
            "model/modeling.py",
        )
    )
    parts += [arrow(172, 135, 216, 135), arrow(412, 135, 456, 135), arrow(652, 135, 796, 135)]
    parts += [squares(420, 208, 3, FILLS["encoder"]), text(442, 236, "tokens", 12, SOFT)]
    parts += [squares(672, 114, 7, FILLS["projector"]), text(724, 104, "embeddings", 12, SOFT)]
    parts += [
        text(724, 156, "in the places of", 12, SOFT),
        text(724, 172, "<|audio|> in the prompt", 12, SOFT),
        text(724, 188, "language/prompts.py", 12, SOFT),
    ]
    parts += [
        f'<rect x="820" y="112" width="260" height="72" rx="6" fill="white" stroke="{LINE}"/>',
        text(950, 134, "<think>A dog barks on the left …</think>", 11),
        text(950, 154, "<answer>left</answer>", 12),
        text(950, 174, "read by language/replies.py", 12, SOFT),
    ]
    # the loops
    columns = (
        (20, "train", "encoder on its own task", "which sound, where, how far", "tasks/trainer.py"),
        (298, "sft", "questions with answers", "loss on the reply alone", "training/sft.py"),
        (576, "grpo", "replies sampled by vLLM", "rewards against the group's mean", "training/grpo_trainer.py"),
        (854, "serve, eval", "the same model in vLLM", "answers with controls", "serving/model.py, eval/runner.py"),
    )
    for x, name, first, second, file in columns:
        parts.append(box(x, 300, 246, 112, FILLS["loop"], name, (first, second), file))
    parts += [arrow(268, 356, 294, 356), arrow(546, 356, 572, 356), arrow(824, 356, 850, 356)]
    parts += [arrow(143, 296, 300, 206, dashed=True), arrow(421, 296, 555, 206, dashed=True)]
    parts += [arrow(440, 296, 850, 236, dashed=True), arrow(720, 296, 900, 236, dashed=True)]
    parts.append(
        text(
            WIDTH / 2,
            448,
            "dashed: what each loop learns. SFT and GRPO can train the encoder too (frozen, LoRA or full).",
            13,
            SOFT,
        )
    )
    parts.append("</svg>")
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    target = Path(__file__).parent / "images" / "model.svg"
    target.write_text(picture(), encoding="utf-8")
    print(f"wrote {target}")
