"""A profile for the user's own model, pairs and benchmarks, with settings that fit the data's size.

`qadapter init` writes it, and beside it a customization for new pairs every week. Both say what each setting does.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qadapter.errors import QAdapterError
from qadapter.evaluation.lm_eval.catalog import check_own, check_tasks
from qadapter.planning.small import ENOUGH_STEPS, MOST_PASSES, passes
from qadapter.preferences.pair import PreferencePair
from qadapter.preferences.sources import locate
from qadapter.preferences.split import ENOUGH_HELDOUT
from qadapter.preferences.stream import DEFAULT_MAX_CHARS, no_usable_pair, parse_files

_FOR_THE_GATE = 40  # held-out prompts: it asks for 30 scored pairs
_LARGE = 1e9  # parameters from which a base is held in bfloat16
_LENGTHS = (64, 96, 128, 192, 256, 384, 512, 768, 1024)


@dataclass(frozen=True)
class Material:
    """What was found out about the user's model and data.

    Attributes:
        model: absolute folder, or hub id.
        parameters: of the model; None: its weights were not looked at.
        context: the longest sequence in tokens; None: no limit is known.
        templated: whether its tokenizer has a chat template; None: it was not looked at.
        pairs: absolute file or folder, URL or `hub:owner/name`.
        usable: pairs; None: they were not looked at.
        prompts: distinct ones.
        longest: tokens of prompt and reply that 95 of 100 replies do not exceed; None: not known.
        own: own benchmarks, name → absolute file.
        tasks: of lm-eval.
    """

    model: str
    parameters: float | None
    context: int | None
    templated: bool | None
    pairs: str
    usable: int | None
    prompts: int
    longest: int | None
    own: Mapping[str, Path]
    tasks: tuple[str, ...]


def look_at(model: str, pairs: str, benchmarks: Sequence[str]) -> Material:
    """Look at the user's model, pairs and benchmarks.

    Args:
        model: folder or hub id of a causal language model. A hub id is not reached for.
        pairs: file, folder, URL or `hub:owner/name`; only what is on this machine is read.
        benchmarks: files of questions, `NAME=FILE`, or names of lm-eval's tasks.

    Raises:
        QAdapterError: what is on this machine cannot be used.
    """
    own, tasks = _benchmarks(benchmarks)
    parameters = context = templated = tokenizer = None
    if Path(model).expanduser().exists():
        from qadapter.config.model import ModelSettings
        from qadapter.planning.estimate import model_size
        from qadapter.policy.base import load_config, load_tokenizer
        from qadapter.policy.loading import check_pretrained
        from qadapter.policy.positions import position_limit

        model = str(Path(model).expanduser().absolute())
        check_pretrained(ModelSettings(pretrained=model), ())
        parameters = model_size(ModelSettings(pretrained=model)).parameters
        context, tokenizer = position_limit(load_config(model)), load_tokenizer(model)
        templated = tokenizer.chat_template is not None
    elif model.startswith((".", "/", "~")):
        raise QAdapterError(f"there is no model at {model!r}; give its folder, or its id on the hub")
    usable: int | None = None
    prompts, longest = 0, None
    if "://" not in pairs and not pairs.startswith("hub:"):
        pairs = str(Path(pairs).expanduser().absolute())
        files = locate(pairs, cache_dir=Path())
        parsed = parse_files(files, max_chars=DEFAULT_MAX_CHARS)
        if not parsed.pairs:
            raise no_usable_pair(files, Counter(one.reason.value for one in parsed.rejected))
        usable, prompts = len(parsed.pairs), len({pair.prompt_digest for pair in parsed.pairs})
        longest = _longest(parsed.pairs, tokenizer)
    return Material(model, parameters, context, templated, pairs, usable, prompts, longest, own, tasks)


def _benchmarks(given: Sequence[str]) -> tuple[dict[str, Path], tuple[str, ...]]:
    own: dict[str, Path] = {}
    tasks = []
    for text in given:
        name, equals, file = text.partition("=")
        path = Path(file if equals else text).expanduser()
        if not equals and not path.suffix and not path.exists():
            tasks.append(text)
            continue
        name = name if equals else path.stem.lower().replace(" ", "-")
        if name in own:
            raise QAdapterError(f"two benchmarks are called {name!r}; give NAME=FILE")
        own[name] = path.absolute()
    check_own(own)
    if tasks:
        check_tasks(tasks)
    return own, tuple(tasks)


def _longest(pairs: Sequence[PreferencePair], tokenizer: object) -> int:
    """Tokens of prompt and longer reply that 95 of 100 pairs do not exceed (4 characters each without a tokenizer)."""
    lengths = []
    for pair in pairs[:2000]:
        texts = [turn["content"] for turn in pair.prompt] + [max(pair.chosen, pair.rejected, key=len)]
        characters = sum(map(len, texts)) + 16 * len(texts)  # the turns' own tokens
        lengths.append(len(tokenizer(" ".join(texts))["input_ids"]) + 8 * len(texts) if tokenizer else characters // 4)  # type: ignore[operator]
    return sorted(lengths)[math.ceil(0.95 * len(lengths)) - 1]


def profile_text(name: str, file: str, found: Material) -> str:
    """The profile as YAML.

    Args:
        name: of the experiment, the domain and the registered model.
        file: the path that the text will have, for the commands in it.
        found: see `look_at`.
    """
    heldout = min(max(_FOR_THE_GATE, found.prompts // 10), max(1, found.prompts // 2))
    train = max(1, round((found.usable or 0) * (1 - heldout / max(found.prompts, 1))))
    batch = 16 if found.usable is None or train >= 16 * ENOUGH_STEPS // 4 else 8
    epochs = 1 if found.usable is None else min(MOST_PASSES, max(1, passes(train, batch)))
    length = next((size for size in _LENGTHS if size >= (found.longest or 512)), _LENGTHS[-1])
    length = min(length, found.context or length)
    large = found.parameters is None or found.parameters >= _LARGE
    answers = min(64, max(8, (found.context or 1024) // 4))
    sized = "" if found.parameters is None else f", {found.parameters / 1e6:,.1f} M parameters"
    counted = (
        "not read yet: expected_pairs lets `qadapter plan` estimate"
        if found.usable is None
        else f"{found.usable} usable pairs on {found.prompts} prompts"
    )
    own = "\n".join(f"      {key}: {_text(path)}" for key, path in found.own.items())
    plain = ", ".join([*found.tasks, *found.own]) if found.templated is False else ""
    return f"""\
# qadapter plan --profile {file}      checks everything and estimates time and memory
# qadapter run --profile {file}       trains, measures, writes the report; a second run trains only what changed
#
# Written by `qadapter init`. Change a setting here, or for one run: qadapter run --profile {file} seeds=[0,1,2]
name: {name}
seeds: [0]  # [0, 1, 2] trains each method three times: only then the report can tell methods from chance

sources:
  # {counted}. `qadapter data` shows how they are read; docs/data.md has the layouts.
  # heldout: so many prompts are not trained on but measured.
  pairs: {{path: {_text(found.pairs)}, heldout: {heldout}}}

model:
  pretrained: {_text(found.model)}{f"  # {sized.removeprefix(', ')}" if sized else ""}
  dtype: {"bfloat16" if large else "float32"}
  # quantization: nf4  # holds the base in 4 bits where GPU memory is short

# The adapter is the same for every method. Without dropout base and adapter run in one pass.
lora: {{rank: 8, alpha: 16, dropout: 0.0}}

training:
  learning_rate: 3.0e-4  # the first setting to vary: 1.0e-4 forgets less, 1.0e-3 learns faster
  epochs: {epochs}  # passes over the pairs
  batch_size: {batch}  # pairs per step
  micro_batch_size: {batch if not large else min(batch, 2)}  # of them at a time: less needs less memory
  max_length: {length}  # tokens of prompt and reply; longer prompts are cut from the left
  warmup_steps: 2
  save_steps: 50  # a killed run resumes from here
{"  gradient_checkpointing: true  # less memory, about a third more time" if large else ""}
domains:
  {name}: {{source: pairs, base: pretrained}}

methods:
  run: [q-adapter, sft, dpo]  # replay needs a section of its own: replay: {{max_new_tokens: 64}}
  q-adapter: {{preset: residual}}
  dpo: {{beta: 0.1}}

# Conversations of before, a file of pairs like the above, let the report say how far the answers to them have moved:
# add `old: {{path: /path/to/old.jsonl}}` to `sources`, set `answers: 16` under `evaluation.retention`, and add
# helpful_sft: {{source: old, lora: true, learning_rate: 3.0e-4, batch_size: 8, max_length: {length}}}

evaluation:
  retention:  # what the model could do before: each is asked of the base and of every adapter
    # Tasks of lm-eval by name (gsm8k_cot, hellaswag, …; `lm_eval ls tasks` lists them).
    tasks: [{", ".join(found.tasks)}]
    # Files of your own questions: multiple choice, short answer or regular expression (docs/evaluation.md).
    own:{" {}" if not own else chr(10) + own}
{f"    plain_tasks: [{plain}]  # the tokenizer has no chat template{chr(10)}" if plain else ""}\
    # limit: 200  # questions per task
    batch_size: 8
    max_new_tokens: {answers}
    answers: 0
  adaptation:
    batch_size: 8
    max_new_tokens: {answers}
    generate: 20  # held-out prompts that every policy answers, for the report's answers
    # A judge that compares answers with the base's: a chat model behind OpenAI's API (docs/pipeline.md).
    judge: none
"""


def weekly_text(name: str, file: str, profile: Path, deliveries: Path, found: Material) -> str:
    """The customization as YAML: new pairs in a folder, trained on and judged when they come.

    Args:
        name, found: as `profile_text` takes them.
        file: the path that the text will have.
        profile: the profile's absolute path.
        deliveries: absolute folder that new files are put into.
    """
    # So many prompts are drawn by their text: fewer than the gate's usual 30 could come out of few.
    share = min(0.5, max(0.1, math.ceil(100 * _FOR_THE_GATE / max(found.prompts, 1)) / 100))
    items = 30 if share * found.prompts >= _FOR_THE_GATE else ENOUGH_HELDOUT
    return f"""\
# qadapter customize --config {file}
#
# New pairs every week: a run trains the last promoted adapter further on the pairs in the folder below. The result is
# promoted only if it learnt something and forgot nothing beyond noise (docs/recurring.md).
name: {name}-weekly
model_name: {name}  # of the registered model
profile: {_text(profile)}
domain: {name}

source:
  path: {_text(deliveries)}
  heldout: {share:g}  # share of the prompts that is measured; a prompt's side depends on its text alone

mix: {{rows: all}}  # new pairs and all earlier ones; a sample of those learns less (docs/continual.md)

gate:
  adaptation: {{metric: implied_reward_accuracy, min_gain: 0.005, beyond_noise: true, min_items: {items}}}
  retention: {{max_drop: 0.02, max_drop_from_base: 0.05, min_items: 30}}
"""


def _text(value: str | Path) -> str:
    """A string that YAML reads back unchanged."""
    return json.dumps(str(value), ensure_ascii=False)
