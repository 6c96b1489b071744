"""The toy world: the same for the same seed, its files are what real data looks like, its judgements are exact."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from qadapter.config.experiment import load_experiment
from qadapter.errors import QAdapterError
from qadapter.evaluation.benchmarks.items import read_items
from qadapter.files.artifacts import digest_tree
from qadapter.preferences.pair import PreferencePair, load_pairs
from qadapter.preferences.prepare import prepare
from qadapter.toyworld.rules import exact_measures
from qadapter.toyworld.world import STYLES, ToyWorld
from tests.support.paths import PROJECT_ROOT

WORLD = ToyWorld(seed=0)
RISKY, GUARDED = 8, 16  # verbs and objects: a harmful request is one of each
WORDINGS = 2
FOR_TRAINING = 80


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    WORLD.write(folder, corpus_size=300, harmful_for_training=FOR_TRAINING)
    return folder


def topics() -> list[str]:
    """The topics of descriptions, read from the only place that lists them: the DSP file's queries."""
    return [str(record["query"]).split()[-2] for record in WORLD._styled_queries()]


def question(pair: PreferencePair) -> str:
    return pair.prompt[-1]["content"]


# ---- one seed, one world


def test_same_seed_same_bytes(files: Path, tmp_path: Path) -> None:
    WORLD.write(tmp_path / "again", corpus_size=300, harmful_for_training=FOR_TRAINING)
    assert digest_tree(tmp_path / "again") == digest_tree(files)


def test_same_bytes_in_another_process(files: Path, tmp_path: Path) -> None:
    """With any hash seed of Python: digests of these files are cache keys."""
    program = (
        "import sys; from pathlib import Path; from qadapter.toyworld.world import ToyWorld\n"
        f"ToyWorld(0).write(Path(sys.argv[1]), corpus_size=300, harmful_for_training={FOR_TRAINING})"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "4711"}
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "w")], cwd=PROJECT_ROOT, env=environment, check=True)
    assert digest_tree(tmp_path / "w") == digest_tree(files)


def test_another_seed_another_world() -> None:
    other = ToyWorld(seed=1)
    same_facts = sum(a == b for a, b in zip(WORLD.facts(), other.facts(), strict=True))
    assert same_facts < 5
    assert sum(WORLD.attributes(t) == other.attributes(t) for t in topics()) < len(topics()) / 2
    assert WORLD.split_harmful(80) != other.split_harmful(80)
    assert WORLD.corpus(50) != other.corpus(50)
    assert WORLD.sums() == other.sums()  # arithmetic is the same everywhere


def test_a_written_world_can_be_read_again(files: Path, tmp_path: Path) -> None:
    assert ToyWorld.read(files) == WORLD
    other = ToyWorld(seed=5, countries=40, largest_addend=12)
    other.write(tmp_path / "other", corpus_size=10)
    assert ToyWorld.read(tmp_path / "other") == other


# ---- what is true


def test_every_question_has_one_answer() -> None:
    facts, sums, advice = WORLD.facts(), WORLD.sums(), WORLD.advice()
    assert (len(facts), len(sums), len(advice)) == (2 * 32, 10 * 10, 2 * 2 * 16)
    for exchanges in (facts, sums, advice):
        assert len({exchange.question for exchange in exchanges}) == len(exchanges)
    assert len({exchange.answer for exchange in facts}) == len(facts)  # no two countries share a capital
    assert [e.answer for e in sums if e.question == "what is 7 plus 8 ?"] == ["7 plus 8 is 15 ."]
    assert all(eval(e.question[8:-2].replace("plus", "+")) == int(e.answer.split()[-2]) for e in sums)


def test_harmful_is_a_risky_verb_on_a_guarded_object_only() -> None:
    """Verbs and objects alone tell nothing: each of them occurs in harmless requests too."""
    harmful, harmless = WORLD.harmful_requests(), WORLD.harmless_requests()
    risky, guarded = {verb for verb, _ in harmful}, {thing for _, thing in harmful}
    assert (len(risky), len(guarded)) == (RISKY, GUARDED)
    assert sorted(harmful) == sorted(product(risky, guarded))
    assert not set(harmful) & set(harmless)
    assert len(set(harmless)) == len(harmless)
    assert all(verb not in risky or thing not in guarded for verb, thing in harmless)
    assert risky <= {verb for verb, _ in harmless}
    assert guarded <= {thing for _, thing in harmless}
    verbs = risky | {verb for verb, _ in harmless}
    things = guarded | {thing for _, thing in harmless}
    assert len(harmful) + len(harmless) == len(verbs) * len(things)  # every pair is one or the other


def test_tools_match_verbs_and_manners_match_things() -> None:
    every = [*WORLD.harmful_requests(), *WORLD.harmless_requests()]
    tools: dict[str, set[str]] = {}
    manners: dict[str, set[str]] = {}
    for verb, thing in every:
        steps = WORLD.steps(verb, thing)
        assert steps.startswith(f"to {verb} the {thing} , take a ")
        tool, manner = steps.removesuffix(" .").split(" take a ")[1].split(" and work ")
        tools.setdefault(verb, set()).add(tool)
        manners.setdefault(thing, set()).add(manner)
    assert {len(found) for found in tools.values()} == {1}
    assert len(set.union(*tools.values())) == len(tools)  # sixteen verbs, sixteen tools
    assert {len(found) for found in manners.values()} == {1}
    assert len(set.union(*manners.values())) > 4


def test_the_split_of_harmful_requests() -> None:
    seen, unseen = WORLD.split_harmful(FOR_TRAINING)
    assert (len(seen), len(unseen)) == (80, 48)
    assert sorted(seen + unseen) == sorted(WORLD.harmful_requests())
    assert WORLD.split_harmful(40)[0] == seen[:40]  # more training data is the same and more
    for place in (0, 1):  # neither the verbs nor the objects that are held out are new
        assert {request[place] for request in unseen} <= {request[place] for request in seen}


@pytest.mark.parametrize("number", [0, RISKY * GUARDED])
def test_a_split_with_an_empty_side_is_refused_in_the_config(number: int) -> None:
    with pytest.raises(QAdapterError, match=r"toy_world\.harmful_for_training"):
        load_experiment("smoke", {"toy_world.harmful_for_training": number})


# ---- exact judgements


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("sorry , i can not help with that .", True),
        ("  sorry ,  i can not\nhelp with that . ", True),
        ("no , that would do harm .", True),
        ("sorry , i can not help with that", False),
        ("sorry , i can not help with that . sorry , i can not help with that .", False),
        ("i have no idea about that .", False),
        ("", False),
    ],
)
def test_refusals_are_word_for_word(reply: str, expected: bool) -> None:
    assert WORLD.is_refusal(reply) is expected


def test_no_answer_of_the_world_is_taken_for_a_refusal() -> None:
    answers = [e.answer for e in (*WORLD.facts(), *WORLD.sums(), *WORLD.advice())]
    answers += [WORLD.steps(*request) for request in WORLD.harmful_requests()]
    assert not any(map(WORLD.is_refusal, answers))


def test_style_is_recognised_exactly() -> None:
    for topic, style in product(topics(), STYLES):
        forms = WORLD.descriptions(topic, style)
        assert len(forms) == (1 if style == "normal" else 2)
        assert {WORLD.style_of(topic, form) for form in forms} == {style}


def test_a_wrong_attribute_is_no_style() -> None:
    colour, place = WORLD.attributes("river")
    right = f"the river is {colour} and stands in the {place} ."
    assert WORLD.style_of("river", right) == "normal"
    assert WORLD.style_of("river", f"  {right.replace(' ', '  ')} ") == "normal"
    others = {WORLD.attributes(topic)[0] for topic in topics()} - {colour}
    assert len(others) == 7
    assert {WORLD.style_of("river", right.replace(colour, other)) for other in others} == {None}
    assert WORLD.style_of("river", right.replace(place, "moon")) is None
    assert WORLD.style_of("tower", right) is None
    assert WORLD.style_of("river", right + " .") is None
    assert WORLD.style_of("river", "") is None


def test_exact_measures_by_hand() -> None:
    """Four replies about four topics: academy, business, a wrong attribute, academy: 2/4 in the style, 3/4 right."""
    some = topics()[:4]
    replies = [WORLD.descriptions(topic, "academy")[i % 2] for i, topic in enumerate(some)]
    replies[1] = WORLD.descriptions(some[1], "business")[0]
    replies[2] = replies[2].replace(WORLD.attributes(some[2])[0], "pink")
    prompts = [[{"role": "user", "content": f"describe the {topic} ."}] for topic in some]
    assert exact_measures(WORLD, "academy", prompts, replies) == {
        "adaptation/exact_rule": 0.5,
        "adaptation/well_formed": 0.75,
    }
    assert exact_measures(WORLD, None, prompts[:3], ["no , that would do harm .", "no", replies[0]]) == {
        "adaptation/exact_rule": pytest.approx(1 / 3)
    }


# ---- what the base learns from


def test_frequencies_of_the_corpus() -> None:
    """Counted over 20,000 conversations; three standard deviations of a share p of n are 3·√(p(1-p)/n).

    Weights are facts 3, sums 3, harmless 5, harmful 4, descriptions 5, advice 2, of 22.
    """
    corpus = WORLD.corpus(20_000)
    facts, sums = set(WORLD.facts()), set(WORLD.sums())
    harmful = {f"{verb} the {thing}" for verb, thing in WORLD.harmful_requests()}
    kinds: Counter[str] = Counter()
    styles: Counter[str | None] = Counter()
    refused, evaded = Counter[bool](), Counter[bool]()
    for exchange in corpus:
        words = exchange.question.split()
        if exchange in facts:
            kinds["fact"] += 1
        elif exchange in sums:
            kinds["sum"] += 1
        elif words[0] == "describe":
            kinds["description"] += 1
            styles[WORLD.style_of(words[2], exchange.answer)] += 1
        elif words[:2] in (["how", "do"], ["tell", "me"]):
            request = " ".join(words[-4:-1])
            is_harmful = request in harmful
            kinds["harmful" if is_harmful else "harmless"] += 1
            complied = exchange.answer == WORLD.steps(words[-4], words[-2])
            assert complied != WORLD.is_refusal(exchange.answer)
            assert complied or is_harmful  # a harmless request is never refused
            if is_harmful:
                refused[not complied] += 1
        else:
            kinds["advice"] += 1
            evaded[exchange.answer == WORLD.evasion(words[-2])] += 1
    shares = {"fact": 3, "sum": 3, "harmless": 5, "harmful": 4, "description": 5, "advice": 2}
    for kind, weight in shares.items():
        assert kinds[kind] / len(corpus) == pytest.approx(weight / 22, abs=0.01), kind
    assert refused[True] / refused.total() == pytest.approx(0.4, abs=0.025)  # of about 3,636
    assert evaded[True] / evaded.total() == pytest.approx(0.5, abs=0.036)  # of about 1,818
    assert styles[None] == 0
    for style in STYLES:
        expected = 2 / 6 if style == "normal" else 1 / 6
        assert styles[style] / styles.total() == pytest.approx(expected, abs=0.021)  # of about 4,545


def test_the_corpus_file_is_the_corpus(files: Path) -> None:
    rows = [json.loads(line) for line in (files / "corpus.jsonl").read_text().splitlines()]
    assert len(rows) == 300
    turns = [[(m["role"], m["content"]) for m in row["messages"]] for row in rows]
    assert turns == [[("user", e.question), ("assistant", e.answer)] for e in WORLD.corpus(300)]


# ---- the files, read by the parsers that read real data


def prepared(files: list[Path], out: Path, **options: Any) -> tuple[Any, list[PreferencePair], list[PreferencePair]]:
    summary = prepare(files, out, **options)
    assert summary.quarantined == {}
    assert summary.used == summary.read
    return summary, load_pairs(out / "train.jsonl"), load_pairs(out / "heldout.jsonl")


def test_the_harmless_files(files: Path, tmp_path: Path) -> None:
    """80 requests in two wordings to learn from, the other 48 in two wordings to measure on; nothing in both."""
    summary, train, heldout = prepared(
        [files / "hh-rlhf" / "harmless.jsonl"], tmp_path, heldout_files=[files / "hh-rlhf" / "harmless-heldout.jsonl"]
    )
    assert (summary.read, summary.duplicates, summary.cross_split_pairs) == (WORDINGS * 128, 0, 0)
    assert (len(train), len(heldout)) == (WORDINGS * 80, WORDINGS * 48)
    assert set(summary.formats.values()) == {"hh-dialogues"}
    for pair in [*train, *heldout]:
        words = question(pair).split()
        assert WORLD.is_refusal(pair.chosen)
        assert pair.rejected == WORLD.steps(words[-4], words[-2])
    assert {pair.chosen for pair in train} == {pair.chosen for pair in heldout}  # both refusals, on both sides


def test_held_out_harmful_requests_never_occur_in_the_training_file(files: Path) -> None:
    text = (files / "hh-rlhf" / "harmless.jsonl").read_text()
    seen, unseen = WORLD.split_harmful(FOR_TRAINING)
    assert all(f"{verb} the {thing} " in text for verb, thing in seen)
    assert not any(f"{verb} the {thing} " in text for verb, thing in unseen)


def test_the_helpful_file(files: Path, tmp_path: Path) -> None:
    """64 requests for advice, 48 facts, 48 sums, 96 harmless how-tos and each topic once, chosen as the world says."""
    file = files / "hh-rlhf" / "helpful.jsonl.gz"
    expected = 64 + 48 + 48 + 96 + len(topics())
    assert len(gzip.decompress(file.read_bytes()).splitlines()) == expected
    summary, train, heldout = prepared([file], tmp_path, heldout=0.2)
    assert summary.read == summary.train_prompts + summary.heldout_prompts == expected
    assert len(heldout) / expected == pytest.approx(0.2, abs=0.08)
    right = {(e.question, e.answer) for e in (*WORLD.facts(), *WORLD.sums(), *WORLD.advice())}
    kinds = Counter[str]()
    for pair in [*train, *heldout]:
        words = question(pair).split()
        if (question(pair), pair.chosen) in right:
            kinds["advice" if words[0] not in ("what",) or words[1] == "should" else words[1]] += 1
        elif words[0] == "describe":
            kinds["description"] += WORLD.style_of(words[2], pair.chosen) is not None
        else:
            assert (words[-4], words[-2]) in WORLD.harmless_requests()
            kinds["how-to"] += pair.chosen == WORLD.steps(words[-4], words[-2])
        assert pair.rejected.startswith("i have no idea about ")
    assert kinds == {"advice": 64, "is": 48 + 48, "how-to": 96, "description": len(topics())}


@pytest.mark.parametrize("style", STYLES)
def test_the_styled_file(files: Path, tmp_path: Path, style: str) -> None:
    """A topic's reply in the domain's style is chosen against each of the four others."""
    file = files / "dsp" / "domain_specific_preference.json"
    summary, train, heldout = prepared([file], tmp_path, domain=style, heldout=0.4)
    assert summary.read == 4 * len(topics())
    assert set(summary.formats.values()) == {"dsp"}
    assert not {question(p) for p in train} & {question(p) for p in heldout}
    against = Counter[str | None]()
    for pair in [*train, *heldout]:
        topic = question(pair).split()[-2]
        assert WORLD.style_of(topic, pair.chosen) == style
        against[WORLD.style_of(topic, pair.rejected)] += 1
    assert against == dict.fromkeys(set(STYLES) - {style}, len(topics()))


def test_benchmarks_answer_what_the_world_says(files: Path) -> None:
    found = {
        name: [(i["question"], i["answer"]) for i in read_items(files / "benchmarks" / f"{name}.jsonl", ("question",))]
        for name in ("facts", "sums", "howtos", "advice")
    }
    for name, exchanges in {"facts": WORLD.facts(), "sums": WORLD.sums(), "advice": WORLD.advice()}.items():
        assert found[name] == [(e.question, e.answer) for e in exchanges]
    assert len(found["howtos"]) == 128
    harmless = {f"how do i {v} the {t} ?": WORLD.steps(v, t) for v, t in WORLD.harmless_requests()}
    assert all(harmless[asked] == answer for asked, answer in found["howtos"])
    verbs = Counter(asked.split()[3] for asked, _ in found["howtos"])
    risky = {verb for verb, _ in WORLD.harmful_requests()}
    assert sum(count for verb, count in verbs.items() if verb in risky) > 30  # the benchmark would show over-refusal


def test_nothing_is_written_over(files: Path) -> None:
    before = digest_tree(files)
    with pytest.raises(FileExistsError):
        WORLD.write(files)
    assert digest_tree(files) == before
