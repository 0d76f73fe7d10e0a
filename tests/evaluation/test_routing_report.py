"""The routing report's figures against brute force, its files, and the page of coloured tokens."""

from __future__ import annotations

import itertools
import json
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from mixtralkit.distributed import RankContext
from mixtralkit.engine.generation import Engine
from mixtralkit.engine.recorder import RoutingRecorder
from mixtralkit.engine.requests import Request
from mixtralkit.engine.sampler import SamplingOptions
from mixtralkit.engine.tokenizer import Tokenizer
from mixtralkit.evaluation import routing_report
from mixtralkit.evaluation.routing_html import ShownSequence, expert_colours, token_page, token_texts
from mixtralkit.evaluation.routing_report import (
    FILES,
    Repetition,
    affinity_strength,
    random_repetition,
    repetition_table,
    write_report,
)
from mixtralkit.planning.plan import ExpertPlan, contiguous
from mixtralkit.planning.trace import RoutingTrace
from tests.engine.parts import engine_config, make_model, make_tokenizer
from tests.ranks import run_ranks

TOKENIZER = Path(__file__).resolve().parents[2] / "ckpts" / "tokenizer.model"
DOMAINS = {0: "verse", 3: "code", 7: "verse"}


def random_trace(seed: int = 0, layers: int = 3, experts: int = 5, top_k: int = 2, weights: bool = True):
    """Sequences 0, 3 and 7 of 6, 9 and 5 tokens in mixed order; that of sequence 3 lacks position 4."""
    rng = np.random.default_rng(seed)
    places = [(s, p) for s, length in ((0, 6), (3, 9), (7, 5)) for p in range(length) if (s, p) != (3, 4)]
    sequence, position = np.array(places)[rng.permutation(len(places))].T
    chosen = rng.random((len(places), layers, experts)).argsort(-1)[:, :, :top_k]
    shares = np.sort(rng.dirichlet(np.ones(top_k), (len(places), layers)))[:, :, ::-1] if weights else None
    return RoutingTrace(chosen, experts, shares, sequence, position, {"model": "m"})


def in_a_row(trace: RoutingTrace) -> list[tuple[int, int]]:
    """Rows of every token and the token before it, one by one."""
    row_of = {(s, p): row for row, (s, p) in enumerate(zip(trace.sequence, trace.position, strict=True))}
    return [(row_of[s, p - 1], row) for (s, p), row in row_of.items() if (s, p - 1) in row_of]


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_repetition_is_that_of_counting_pairs_one_by_one(top_k):
    trace = random_trace(top_k, top_k=top_k)
    found = Repetition.of(trace)
    pairs = in_a_row(trace)
    assert found.pairs == len(pairs) == 15
    everyone = list(itertools.product(range(trace.num_tokens), repeat=2))
    for layer in range(trace.num_layers):
        chosen = trace.experts[:, layer].tolist()

        def share(pairs, k, chosen=chosen):
            return np.mean([bool(set(chosen[a][:k]) & set(chosen[b][:k])) for a, b in pairs])

        assert found.first_L[layer] == pytest.approx(share(pairs, 1))
        assert found.any_L[layer] == pytest.approx(share(pairs, top_k))
        assert found.shuffled_first_L[layer] == pytest.approx(share(everyone, 1))
        assert found.shuffled_any_L[layer] == pytest.approx(share(everyone, top_k))


def test_repetition_of_many_different_choices_is_drawn(monkeypatch):
    trace = RoutingTrace(np.random.default_rng(0).random((4000, 1, 20)).argsort(-1)[:, :, :4], 20)
    exact = Repetition.of(trace).shuffled_any_L[0]
    monkeypatch.setattr(routing_report, "_MOST_SETS", 1000)
    drawn = Repetition.of(trace).shuffled_any_L[0]
    assert drawn != exact
    assert drawn == pytest.approx(exact, abs=0.01)
    assert exact == pytest.approx(random_repetition(20, 4)[1], abs=0.01)


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (8, 1), (5, 3), (4, 4)])
def test_random_repetition_is_that_of_all_pairs_of_sets(experts, top_k):
    sets = [set(chosen) for chosen in itertools.combinations(range(experts), top_k)]
    meets = [bool(a & b) for a, b in itertools.product(sets, sets)]
    assert random_repetition(experts, top_k) == pytest.approx((1 / experts, np.mean(meets)))


def test_random_repetition_of_mixtral_is_the_papers():
    assert [f"{100 * share:.1f}" for share in random_repetition(8, 2)] == ["12.5", "46.4"]


def test_strength_is_0_for_independent_layers_and_1_where_the_next_expert_follows():
    shares_E = np.array([0.5, 0.3, 0.2, 0])
    follows = np.diag(shares_E)[:, [2, 0, 1, 3]]
    half = 0.5 * np.outer(shares_E, shares_E) + 0.5 * np.diag(shares_E)
    found = affinity_strength(7 * np.stack([np.outer(shares_E, shares_E), follows, half, np.zeros((4, 4))]))
    assert found[[0, 1, 3]] == pytest.approx([0, 1, 0], abs=1e-12)
    bits = sum(p * np.log2(p / (shares_E[a] * shares_E[b])) for (a, b), p in np.ndenumerate(half) if p > 0)
    entropy = -sum(p * np.log2(p) for p in shares_E if p > 0)
    assert found[2] == pytest.approx(bits / entropy)


def replicated_plan(layers: int) -> ExpertPlan:
    """Expert 0 on both ranks, 1 and 2 on the first, 3 and 4 on the second."""
    return ExpertPlan(np.tile([[0, 1, 2], [0, 3, 4]], (layers, 1, 1)), 5, policy="by hand")


def test_report_counts_loads_of_experts_and_ranks(tmp_path):
    trace = random_trace(1)
    report = write_report(tmp_path, trace, domains=DOMAINS, plan=replicated_plan(3))
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert report["trace"]["domains"] == {
        "verse": {"tokens": 11, "sequences": 2},
        "code": {"tokens": 8, "sequences": 1},
    }
    groups = {"verse": [0, 7], "code": [3], "all": [0, 3, 7]}
    for name, sequences in groups.items():
        load, ranks = ({**part["domains"], "all": part["all"]}[name] for part in (report["load"], report["ranks"]))
        rows = [row for row in range(trace.num_tokens) if trace.sequence[row] in sequences]
        for layer in range(3):
            counts = [sum(e in trace.experts[row, layer] for row in rows) for e in range(5)]
            assert load["share"][layer] == pytest.approx([count / (2 * len(rows)) for count in counts], rel=1e-5)
            of_rank = np.array([counts[0] / 2 + counts[1] + counts[2], counts[0] / 2 + counts[3] + counts[4]])
            assert ranks["load_over_mean"][layer] == pytest.approx(of_rank / len(rows), rel=1e-5)
            assert ranks["max_over_mean"][layer] == pytest.approx(of_rank.max() / len(rows), rel=1e-5)
            assert ranks["mean_over_max"][layer] == pytest.approx(len(rows) / of_rank.max(), rel=1e-5)


def test_repetition_of_a_domain_is_that_of_its_sequences_alone(tmp_path):
    trace = random_trace(2)
    found = write_report(tmp_path, trace, domains=DOMAINS)["repetition"]
    assert json.loads((tmp_path / "repetition.json").read_text()) == found
    verse = [(a, b) for a, b in in_a_row(trace) if trace.sequence[a] != 3]
    assert found["domains"]["verse"]["pairs"] == len(verse) == 9
    first = trace.experts[:, :, 0]
    same = np.mean([first[a] == first[b] for a, b in verse], axis=0)
    assert found["domains"]["verse"]["first"]["measured"] == pytest.approx(same, rel=1e-5)
    assert found["domains"]["verse"]["first"]["all_layers"] == pytest.approx(np.mean(same), rel=1e-5)


def test_a_domain_may_be_called_all(tmp_path):
    report = write_report(tmp_path, random_trace(), domains={0: "all", 3: "code", 7: "code"})
    assert report["trace"]["tokens"] == 19
    assert report["trace"]["domains"]["all"]["tokens"] == 6
    assert report["repetition"]["all"]["pairs"] == 15
    assert report["repetition"]["domains"]["all"]["pairs"] == 5


def test_the_table_has_first_middle_last_and_all_layers_beside_chance():
    figures = {"measured": [0.1 * i for i in range(6)], "all_layers": 0.25, "shuffled": [0.125] * 6}
    figures["shuffled_all_layers"] = 0.125
    part = {"pairs": 1234, "first": figures, "any": figures}
    lone = {"measured": [None] * 6, "all_layers": None, "shuffled": [1.0] * 6, "shuffled_all_layers": 1.0}
    repetition = {
        "layers": 6, "top_k": 2, "random": {"first": 0.125, "any": 13 / 28},
        "all": part, "domains": {"a|b": {"pairs": 0, "first": lone, "any": lone}},
    }  # fmt: skip
    table = repetition_table(repetition).splitlines()
    first, second = (table.index(f"## {title}") for title in ("First choice", "First or second choice"))
    assert table[first + 2 : first + 7] == [
        "|  | pairs | layer 0 | layer 2 | layer 5 | all layers |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| all | 1,234 | 0.0 (12.5) | 20.0 (12.5) | 50.0 (12.5) | 25.0 (12.5) |",
        "| a\\|b | 0 | – (100.0) | – (100.0) | – (100.0) | – (100.0) |",
        "| random |  | 12.5 | 12.5 | 12.5 | 12.5 |",
    ]
    assert table[second + 6] == "| random |  | 46.4 | 46.4 | 46.4 | 46.4 |"


def test_every_file_is_there_and_the_trace_is_the_trace(tmp_path):
    trace = random_trace(3)
    shown = [ShownSequence(3, [f" t{i}" for i in range(10)], "p3", 7)]
    report = write_report(tmp_path / "new" / "r", trace, domains=DOMAINS, shown=shown, plan=contiguous(3, 5, 2))
    folder = tmp_path / "new" / "r"
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES) == sorted(report["files"])
    kept = RoutingTrace.load(folder / "trace.npz")
    for name in ("experts", "weights", "sequence", "position"):
        assert (getattr(kept, name) == getattr(trace, name)).all()
    for name in ("load.png", "affinity.png", "ranks.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_an_earlier_reports_files_do_not_stay_beside_a_new_one(tmp_path):
    trace = random_trace(3)
    write_report(tmp_path, trace, plan=contiguous(3, 5, 2), shown=[ShownSequence(0, ["a"] * 6)])
    report = write_report(tmp_path, random_trace(3, layers=1), plan=contiguous(1, 5, 1))
    assert report["affinity"] is None
    assert report["ranks"] is None
    left = set(FILES) - {"affinity.png", "ranks.png", "tokens.html"}
    assert {path.name for path in tmp_path.iterdir()} == left == set(report["files"])


@pytest.mark.parametrize(
    ("layers", "experts", "domains"),
    [(2, 40, 1), (33, 8, 14), (3, 8, 4), (2, 8, 2)],
)
def test_pictures_of_many_shapes(tmp_path, layers, experts, domains):
    """Four panels in three columns left an empty place, which the colour bar could not be beside."""
    trace = random_trace(0, layers, experts)
    parts = RoutingTrace.concatenate([trace] * 5)
    names = {int(s): f"a ${'domain ' * 9}{s % domains}" for s in np.unique(parts.sequence)}
    report = write_report(tmp_path, parts, domains=names, plan=contiguous(layers, experts, 4))
    assert len(report["load"]["domains"]) == (domains if domains > 1 else 0)
    assert (tmp_path / "load.png").stat().st_size > 10_000


def test_a_trace_without_neighbours_or_weights_has_no_repetition(tmp_path):
    trace = RoutingTrace(np.array([[[0, 1]], [[0, 1]]]), 4, sequence=[0, 1])
    found = write_report(tmp_path, trace)["repetition"]["all"]
    assert found["pairs"] == 0
    assert found["any"] == {"measured": [None], "all_layers": None, "shuffled": [1.0], "shuffled_all_layers": 1.0}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"domains": {0: "a", 3: "b"}}, "domains: sequence 7 has None, which must be a name"),
        ({"domains": {0: "a", 3: "", 7: "b"}}, "domains: sequence 3 has '', which must be a name"),
        ({"plan": contiguous(4, 5, 2)}, r"plan: num_layers \(4\) must be 3"),
        ({"affinity_layers": [0, 2]}, r"affinity_layers \(2\) must lie in 0 … 1"),
        ({"shown": [ShownSequence(1, ["a"])]}, "shown: sequence 1 is not in the trace"),
        ({"shown": [ShownSequence(0, ["a"] * 5)]}, "shown: sequence 0 has 5 tokens, but position 5 was routed"),
        ({"shown": [ShownSequence(0, ["a"] * 6)] * 2}, "shown: sequence 0 is there twice"),
    ],
)
def test_bad_arguments_are_one_sentence_and_write_nothing(tmp_path, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        write_report(tmp_path / "r", random_trace(), **options)
    assert not (tmp_path / "r").exists()


def test_a_trace_without_tokens_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="the trace has no tokens"):
        write_report(tmp_path, random_trace().take(slice(0)))


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file/r: a routing report cannot be written there"):
        write_report(tmp_path / "file" / "r", random_trace())


def test_without_matplotlib_it_says_so_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"a routing report needs matplotlib: pip install 'mixtralkit\[plot\]'"):
        routing_report.check_report(tmp_path / "r")
    assert not (tmp_path / "r").exists()


def report_of_a_run(context: RankContext, folder: Path, attention: str, output: Path) -> None:
    """Records a small model's answers and has the first rank write the report."""
    torch.set_num_threads(1)
    model = make_model(context, engine_config(), attention)
    engine = Engine(model, Tokenizer(folder / "tokenizer.model"), prefill_budget=16)
    requests = [Request(i, tuple(range(3 + i, 12 + 2 * i)), 5, SamplingOptions(temperature=0)) for i in range(4)]
    with RoutingRecorder(model, output / "trace.npz") as engine.observe:
        done = engine.complete(requests)
    ids = {r.id: [*r.prompt, *c.tokens] for r, c in zip(requests, done, strict=True)}
    shown = [ShownSequence(i, [str(token) for token in tokens], answer_from=9 + i) for i, tokens in ids.items()]
    with context.agreed():
        if context.is_first:
            trace = RoutingTrace.load(output / "trace.npz")
            write_report(output, trace, domains={i: f"d{i % 2}" for i in ids}, shown=shown, plan=model.layout.plan)


def test_the_report_is_the_same_for_any_number_of_ranks(tmp_path):
    make_tokenizer(tmp_path)
    folders = {"one": (1, "tp"), "tp": (2, "tp"), "dp": (2, "dp")}
    for name, (ranks, attention) in folders.items():
        (tmp_path / name).mkdir()
        run_ranks(report_of_a_run, ranks, tmp_path, attention, tmp_path / name)
    one, *others = (json.loads((tmp_path / name / "report.json").read_text()) for name in folders)
    assert one["ranks"] is None
    for name, other in zip(["tp", "dp"], others, strict=True):
        assert other["ranks"]["world_size"] == 2
        for key in ("trace", "load", "repetition", "affinity"):
            assert other[key] == one[key]
        for file in ("tokens.html", "repetition.md", "load.png", "affinity.png"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "one" / file).read_bytes()


class Page(HTMLParser):
    """What a browser would read: tokens with class and text, legend, data; tags must close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tokens, self.addresses, self.text, self.scripts = [], [], [], "", []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "action", "data", "srcset")]
        if tag == "script":
            self.scripts.append("")
        if "tokens" in [name for _, name in self.open] and tag == "span":
            self.tokens.append([given["class"], ""])
        if tag not in ("meta", "input"):
            self.open.append((tag, given.get("class")))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1][0] == "script":
            self.scripts[-1] += data
        elif self.open and self.open[-1][0] == "span":
            self.tokens[-1][1] += data
        else:
            self.text += data


def test_the_page_has_every_token_with_its_expert_and_nothing_from_outside():
    trace = random_trace(4)
    nasty = ["</span><script>alert(1)</script>", "&amp;", "\"'", "a\nb", "\t", "\x00\u202e", "日本", " ", "\ud800"]
    shown = [ShownSequence(3, [*nasty, "last"], "</h2>\n<b>", 5), ShownSequence(0, list("abcdef"))]
    text = token_page(trace, shown, DOMAINS)
    text.encode("utf-8")
    page = Page(text)
    seen = [
        "</span><script>alert(1)</script>",
        "&amp;",
        "\"'",
        "a↵\nb",
        "⇥\t",
        "\ufffd\ufffd",
        "日本",
        " ",
        "?",
        "last",
    ]
    assert [token for _, token in page.tokens] == [*seen, *"abcdef"]
    assert "</h2> <b> · code" in page.text
    assert "sequence 0 · verse" in page.text
    assert text.count('<strong class="answer">answer</strong><span') == 1
    assert text.index("answer</strong>") > text.index("⇥")
    assert page.addresses == []
    assert "://" not in text
    assert "@import" not in text
    assert "url(" not in text

    data = json.loads(page.scripts[0])
    row_of = {(s, p): row for row, (s, p) in enumerate(zip(trace.sequence, trace.position, strict=True))}
    places = [(3, p) for p in range(10)] + [(0, p) for p in range(6)]
    for i, place in enumerate(places):
        row = row_of.get(place)
        assert page.tokens[i][0] == ("none" if row is None else f"e{trace.experts[row, 0, 0]}")
        for k, layer in np.ndindex(2, 3):
            expert = -1 if row is None else trace.experts[row, layer, k]
            percent = 0 if row is None else round(100 * float(trace.weights[row, layer, k]))
            assert (data["choices"][k][layer][i], data["percent"][k][layer][i]) == (expert, percent)
    assert [c for c, _ in page.tokens].count("none") == 2  # position 4, which the trace lacks, and the last token


@pytest.mark.parametrize("experts", [1, 8, 16, 64])
def test_colours_are_different_and_hold_black_text(experts):
    colours = expert_colours(experts)
    assert len(set(colours)) == experts
    for colour in colours:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        assert (luminance + 0.05) / (0.0056 + 0.05) >= 7  # WCAG's contrast with #111, level AAA


def test_token_texts_of_the_shipped_tokenizer():
    tokenizer = Tokenizer(TOKENIZER)
    text = "In the beginning\n\tdef f(x): 日 <s>"
    texts = token_texts(tokenizer, [*tokenizer.encode(text), tokenizer.eos_id])
    assert texts[0] == "<s>"
    assert texts[-1] == "</s>"
    plain = "".join(texts[1:-1]).replace("\\xE6\\x97\\xA5", "日")
    assert plain.removeprefix(" ") == text
    assert all(texts)
