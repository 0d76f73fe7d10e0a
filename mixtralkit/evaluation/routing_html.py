"""A page of texts whose tokens have the colour of their expert: one file, which opens without a network."""

from __future__ import annotations

import colorsys
import html
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mixtralkit.engine.tokenizer import Tokenizer
from mixtralkit.planning.trace import RoutingTrace

# Paul Tol's "light" scheme, made for cells behind black text (https://sronpersonalpages.nl/~pault/).
_LIGHT = ("#77AADD", "#EE8866", "#EEDD88", "#FFAABB", "#99DDFF", "#44BB99", "#BBCC33", "#AAAA00")
_BREAKS = {"\n": "↵\n", "\r": "␍", "\t": "⇥\t"}


@dataclass(frozen=True)
class ShownSequence:
    """A sequence of the trace with its text.

    Attributes:
        sequence: its number in the trace.
        tokens: the text of every token, that at position 0 first (``token_texts``). Tokens that the trace does not
            have, such as the last one generated, are shown without a colour.
        title: what to call it, such as the prompt's id.
        answer_from: position of the first generated token; None where the text is the prompt alone.
    """

    sequence: int
    tokens: Sequence[str]
    title: str = ""
    answer_from: int | None = None


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """What each id looks like by itself: its text, ``<s>`` and the like by name, part of a character as ``\\xE2``."""
    texts = []
    for token in ids:
        data = tokenizer.piece_bytes[token] if token < tokenizer.n_words else b""
        if not data:
            texts.append(tokenizer.piece(token) or f"<{token}>")
            continue
        try:
            texts.append(data.decode("utf-8"))
        except UnicodeDecodeError:
            texts.append("".join(f"\\x{byte:02X}" for byte in data))
    return texts


def expert_colours(num_experts: int) -> list[str]:
    """Background colours ``#RRGGBB``, light enough for black text (contrast of 7 or more).

    Up to 8 are told apart by readers with any colour vision; beyond, neighbours differ in hue and lightness, and the
    page shows the experts' numbers as well.
    """
    if num_experts <= len(_LIGHT):
        return list(_LIGHT[:num_experts])
    colours = []
    for expert in range(num_experts):
        hue, lightness = expert * 0.618034 % 1, (0.77, 0.88)[expert % 2]
        rgb = colorsys.hls_to_rgb(hue, lightness, 0.75)
        colours.append("#" + "".join(f"{round(255 * part):02X}" for part in rgb))
    return colours


def token_page(trace: RoutingTrace, shown: Sequence[ShownSequence], domains: Mapping[int, str] | None = None) -> str:
    """HTML of the sequences: a slider for the layer, first or further choices, a legend that picks one expert out.

    Without JavaScript it shows layer 0. ValueError for a sequence that the trace does not have, that is shown twice or
    whose text is too short.
    """
    rows = [_rows(trace, one, shown[:index]) for index, one in enumerate(shown)]
    row_T = np.concatenate(rows)
    found = {
        "layers": trace.num_layers,
        "experts": trace.num_experts,
        "choices": [_column(trace.experts[:, :, k], row_T, -1) for k in range(trace.top_k)],
        "percent": None,
    }
    if trace.weights is not None:
        percent = np.rint(100 * trace.weights.astype(np.float32)).astype(int)
        found["percent"] = [_column(percent[:, :, k], row_T, 0) for k in range(trace.top_k)]
    first_layer = iter(found["choices"][0][0])
    sections = [_section(one, (domains or {}).get(one.sequence), first_layer) for one in shown]
    colours = expert_colours(trace.num_experts)
    return _PAGE.format(
        style=_STYLE + "".join(f".e{e}{{background:{colour}}}" for e, colour in enumerate(colours)),
        last=trace.num_layers - 1,
        choices="".join(f'<option value="{k}">{_ordinal(k)} choice</option>' for k in range(trace.top_k)),
        numbers=" checked" if trace.num_experts > len(_LIGHT) else "",
        numbered=' class="numbered"' if trace.num_experts > len(_LIGHT) else "",
        legend="".join(
            f'<button type="button" class="e{e}" data-expert="{e}" aria-pressed="false">expert {e} <b></b></button>'
            for e in range(trace.num_experts)
        ),
        sections="\n".join(sections),
        data=json.dumps(found, separators=(",", ":")),
        script=_SCRIPT,
    )


def _rows(trace: RoutingTrace, one: ShownSequence, before: Sequence[ShownSequence]) -> np.ndarray:
    """Row of the trace of each token, -1 for those that it does not have."""
    if any(one.sequence == other.sequence for other in before):
        raise ValueError(f"shown: sequence {one.sequence} is there twice")
    rows = np.flatnonzero(trace.sequence == one.sequence)
    if not len(rows):
        raise ValueError(f"shown: sequence {one.sequence} is not in the trace")
    last = int(trace.position[rows].max())
    if last >= len(one.tokens):
        raise ValueError(f"shown: sequence {one.sequence} has {len(one.tokens)} tokens, but position {last} was routed")
    row_T = np.full(len(one.tokens), -1)
    row_T[trace.position[rows]] = rows
    return row_T


def _column(values_NL: np.ndarray, row_T: np.ndarray, absent: int) -> list[list[int]]:
    """[L][T]"""
    return np.where(row_T >= 0, values_NL[row_T].T, absent).tolist()


def _section(one: ShownSequence, domain: str | None, experts: Iterator[int]) -> str:
    names = [name for name in (one.title or f"sequence {one.sequence}", domain) if name]
    head = html.escape(_visible(" ".join(" · ".join(names).split())))
    spans = []
    for position, text in enumerate(one.tokens):
        if position == one.answer_from:
            spans.append('<strong class="answer">answer</strong>')
        expert = next(experts)
        name, number = ("none", "") if expert < 0 else (f"e{expert}", str(expert))
        spans.append(f'<span class="{name}" data-e="{number}">{html.escape(_visible(text))}</span>')
    size = f"<small>{len(one.tokens)} tokens</small>"
    return f'<section><h2>{head} {size}</h2><p class="tokens">{"".join(spans)}</p></section>'


def _visible(text: str) -> str:
    """Line breaks and tabs with a sign before them, other control and direction characters as a replacement sign."""
    clean = text.encode("utf-8", "replace").decode("utf-8")
    return "".join(_BREAKS.get(sign, sign) if sign in _BREAKS or sign.isprintable() else "\ufffd" for sign in clean)


def _ordinal(k: int) -> str:
    return {0: "first", 1: "second", 2: "third"}.get(k, f"{k + 1}th")


_STYLE = """
:root{color-scheme:light}
body{margin:0;font:16px/1.5 system-ui,sans-serif;color:#111;background:#fff}
header{position:sticky;top:0;z-index:1;padding:.6rem 1rem;background:#fff;border-bottom:2px solid #555}
h1{font-size:1.2rem;margin:0 0 .4rem}
h2{font-size:1rem;margin:0 0 .4rem}
small{font-weight:normal;color:#444}
main{max-width:75rem;padding:0 1rem 6rem}
section{margin:1.2rem 0;padding-top:1rem;border-top:2px solid #555}
section:first-child{border-top:0;padding-top:0}
.controls{display:flex;flex-wrap:wrap;gap:.4rem 1.2rem;align-items:center}
.controls input[type=range]{width:min(24rem,50vw);vertical-align:middle}
#legend{display:flex;flex-wrap:wrap;gap:.3rem;margin-top:.5rem}
button{font:inherit;font-size:.85rem;color:#111;padding:.1rem .5rem;border:2px solid transparent;border-radius:.3rem;
cursor:pointer}
button[aria-pressed=true]{border-color:#111}
:focus-visible{outline:3px solid #0050b5;outline-offset:2px}
.tokens{margin:0;font:15px/1.9 ui-monospace,monospace;white-space:pre-wrap;overflow-wrap:anywhere;tab-size:4}
.tokens span{padding:.12em 0;border-radius:.15em;box-shadow:inset -1px 0 #fff;unicode-bidi:isolate}
.tokens .none{outline:1px dotted #777;outline-offset:-1px}
.tokens .dim{background:#fff;color:#767676}
.answer{margin:0 .4em;padding:0 .4em;font:bold .75rem/1.4 system-ui,sans-serif;color:#fff;background:#333;
border-radius:.3rem}
.numbered .tokens span::before{content:attr(data-e);font-size:.65em;vertical-align:super;color:#111}
#token{position:fixed;bottom:0;left:0;right:0;margin:0;padding:.4rem 1rem;background:#fff;border-top:2px solid #555;
font-size:.85rem;max-height:30vh;overflow:auto}
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>Tokens by expert</title>
<style>{style}</style>
</head>
<body{numbered}>
<header>
<h1>Tokens by expert</h1>
<noscript><p>Without JavaScript the colours are those of layer 0.</p></noscript>
<div class="controls">
<label>Layer <input id="layer" type="range" min="0" max="{last}" value="0" step="1" autocomplete="off">
<output id="shown" for="layer">0</output> of 0 … {last}</label>
<label>Choice <select id="choice" autocomplete="off">{choices}</select></label>
<label><input id="numbers" type="checkbox"{numbers}> numbers</label>
<small>← and → change the layer; a colour below shows that expert alone; dotted tokens were not routed.</small>
</div>
<div id="legend" role="group" aria-label="Experts, with their share of the tokens shown">{legend}</div>
</header>
<main>
{sections}
</main>
<p id="token" role="status">Point at a token, or touch it, to see its experts in every layer.</p>
<script id="data" type="application/json">{data}</script>
<script>{script}</script>
</body>
</html>
"""

_SCRIPT = """
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const tokens = Array.from(document.querySelectorAll(".tokens span"));
const buttons = Array.from(document.querySelectorAll("#legend button"));
const layer = document.getElementById("layer");
const choice = document.getElementById("choice");
const numbers = document.getElementById("numbers");
const status = document.getElementById("token");
let only = -1;

function paint() {
  const experts = data.choices[Number(choice.value)][Number(layer.value)];
  const counts = new Array(data.experts).fill(0);
  tokens.forEach((token, i) => {
    const expert = experts[i];
    if (expert >= 0) counts[expert] += 1;
    token.className = expert < 0 ? "none" : "e" + expert + (only >= 0 && only !== expert ? " dim" : "");
    token.dataset.e = expert < 0 ? "" : expert;
  });
  const all = Math.max(1, counts.reduce((sum, count) => sum + count, 0));
  buttons.forEach((button, expert) => {
    button.querySelector("b").textContent = Math.round(100 * counts[expert] / all) + "%";
    button.setAttribute("aria-pressed", String(only === expert));
  });
  document.getElementById("shown").textContent = layer.value;
}

function describe(i) {
  if (data.choices[0][0][i] < 0) {
    status.textContent = "not routed in this run";
    return;
  }
  const lines = [];
  for (let l = 0; l < data.layers; l += 1) {
    const taken = data.choices.map((byLayer, k) =>
      "e" + byLayer[l][i] + (data.percent ? " " + data.percent[k][l][i] + "%" : ""));
    lines.push("layer " + l + ": " + taken.join(", "));
  }
  status.textContent = "“" + tokens[i].textContent.trim() + "”  " + lines.join("  ·  ");
}

layer.addEventListener("input", paint);
choice.addEventListener("change", paint);
numbers.addEventListener("change", () => document.body.classList.toggle("numbered", numbers.checked));
buttons.forEach((button, expert) => button.addEventListener("click", () => {
  only = only === expert ? -1 : expert;
  paint();
}));
document.addEventListener("keydown", (event) => {
  const step = {ArrowLeft: -1, ArrowRight: 1}[event.key];
  const isTaken = event.target === layer || event.target === choice || event.ctrlKey || event.altKey || event.metaKey;
  if (!step || isTaken) return;
  layer.value = Number(layer.value) + step;
  paint();
});
const places = new Map(tokens.map((token, i) => [token, i]));
["pointerover", "click"].forEach((kind) => document.addEventListener(kind, (event) => {
  if (places.has(event.target)) describe(places.get(event.target));
}));
numbers.checked = document.body.classList.contains("numbered");
paint();
"""
