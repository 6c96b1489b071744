"""What guided decoding learns from: the base's own replies with rewards (VAS), and pairs of continuations (PITA)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qadapter.config.base import Count, Positive, Settings
from qadapter.config.model import ModelSettings
from qadapter.config.training import OptimizerSettings
from qadapter.files.artifacts import read_json_lines
from qadapter.methods.method import Need, PairsPlan, Work
from qadapter.methods.needs import reward_model
from qadapter.methods.needs.reward_model import RewardModelSettings, open_rewards

ROLLOUTS, BRANCHES = "rollouts", "branches"
_FILES = {ROLLOUTS: "rollouts.jsonl", BRANCHES: "branches.jsonl"}


class RolloutSettings(Settings):
    """The base's replies to the training prompts.

    Attributes:
        per_prompt: replies for each distinct prompt.
        temperature: of the sampling.
        max_new_tokens: of a reply; None: as many as the longest reply of a pair has, chosen or rejected, for the reward
            of a reply without its end says little. Half of `training.max_length` is theirs at least; prompts that leave
            less lose their beginning.
    """

    per_prompt: Count = 4
    temperature: Positive = 1.0
    max_new_tokens: Count | None = None


def rollouts(settings: RolloutSettings, reward: RewardModelSettings) -> Need:
    """The need for scored replies of the base."""
    needs = (reward_model.reward_model(reward),)
    return Need(ROLLOUTS, settings, "pairs", sample_rollouts, _work, needs=needs, takes=("training",))


def branches(settings: RolloutSettings, reward: RewardModelSettings) -> Need:
    """The need for labelled pairs of continuations of the base; `per_prompt` is the number of cuts."""
    needs = (reward_model.reward_model(reward),)
    return Need(BRANCHES, settings, "pairs", sample_branches, _branch_work, needs=needs, takes=("training",))


def _work(settings: RolloutSettings, plan: PairsPlan) -> Work:
    """Sampling, and the reward model's pass."""
    return Work(0, plan.pairs * settings.per_prompt * plan.tokens_per_sequence, 2)


def _branch_work(settings: RolloutSettings, plan: PairsPlan) -> Work:
    """A roll-in per prompt; at each cut two continuations, and the reward model's pass over both."""
    return Work(0, plan.pairs * (1 + 4 * settings.per_prompt) * plan.tokens_per_sequence, 1)


class _Sampler:
    """The base, its tokenizer, the training prompts as token ids, and the reward model."""

    def __init__(
        self,
        base: str | Path,
        pairs_file: Path,
        model: ModelSettings,
        settings: RolloutSettings,
        batch_size: int,
        folder: Path,
        training: OptimizerSettings,
    ) -> None:
        from qadapter.policy.loading import load_base
        from qadapter.preferences.pair import load_pairs
        from qadapter.preferences.tokenize import beside_replies, encode_pairs

        self.network, self.tokenizer = load_base(base, model)
        self.settings, self._batch_size = settings, batch_size
        pairs = encode_pairs(load_pairs(pairs_file), self.tokenizer, training.max_length).pairs
        prompts = [list(ids) for ids in dict.fromkeys(tuple(pair.prompt_ids) for pair in pairs)]
        longest = settings.max_new_tokens or max(len(ids) for p in pairs for ids in (p.chosen_ids, p.rejected_ids))
        self.prompts, self.longest = beside_replies(prompts, longest, training.max_length)
        self._folder, self._base, self._model = folder, base, model
        self.generated = 0

    def continued(self, rows: list[list[int]], seed: int, *, greedily: bool = False) -> list[list[int]]:
        """Continuations of sequences of token ids."""
        from qadapter.inference.continuations import continue_ids

        found = continue_ids(
            self.network,
            self.tokenizer,
            rows,
            max_new_tokens=self.longest,
            batch_size=self._batch_size,
            temperature=0.0 if greedily else self.settings.temperature,
            seed=seed,
        )
        self.generated += sum(map(len, found))
        return found

    def rewards(self, rows: list[list[int]], *, standardised: bool = True) -> list[float]:
        """The reward model's."""
        reward = open_rewards(self._folder, self._base, self._model, self._batch_size, standardised=standardised)
        return reward(rows)

    def write(self, out: Path, name: str, rows: list[dict[str, Any]]) -> None:
        """Write the rows, and what they cost."""
        from qadapter.files.artifacts import write_json, write_json_lines

        write_json_lines(out / _FILES[name], rows)
        write_json(out / "metrics.json", {"cost/generated_tokens": self.generated, f"{name}/rows": len(rows)})


def sample_rollouts(
    base: str | Path,
    pairs_file: Path,
    *,
    model: ModelSettings,
    settings: RolloutSettings,
    batch_size: int,
    seed: int,
    out: Path,
    needs: Mapping[str, Path],
    training: OptimizerSettings,
    scratch: Path | None = None,
) -> None:
    """Write `rollouts.jsonl`: for each reply of the base `prompt`, `reply` (token ids) and its `reward`."""
    from qadapter.progress.kept import keeping

    sampler = _Sampler(base, pairs_file, model, settings, batch_size, needs[reward_model.NAME], training)
    prompts = [prompt for prompt in sampler.prompts for _ in range(settings.per_prompt)]
    with keeping(scratch):
        replies = sampler.continued(prompts, seed)
    rewards = sampler.rewards([prompt + reply for prompt, reply in zip(prompts, replies, strict=True)])
    rows = zip(prompts, replies, rewards, strict=True)
    sampler.write(out, ROLLOUTS, [{"prompt": p, "reply": y, "reward": r} for p, y, r in rows])


def sample_branches(
    base: str | Path,
    pairs_file: Path,
    *,
    model: ModelSettings,
    settings: RolloutSettings,
    batch_size: int,
    seed: int,
    out: Path,
    needs: Mapping[str, Path],
    training: OptimizerSettings,
    scratch: Path | None = None,
) -> None:
    """Write `branches.jsonl`: `prompt` (with the reply up to the cut), `reply` (a continuation), `preferred` (1 or 0).

    The first cut of each reply is before its first token, the others are drawn. At each cut one continuation is greedy
    and one is sampled; which is preferred is drawn with the probability σ(r_greedy − r_sampled), with r on the reward
    model's own scale. Two equal continuations are left out.
    """
    import math
    import random

    from qadapter.progress.kept import keeping

    sampler = _Sampler(base, pairs_file, model, settings, batch_size, needs[reward_model.NAME], training)
    draw = random.Random(seed)
    prefixes = []
    with keeping(scratch):
        for prompt, reply in zip(sampler.prompts, sampler.continued(sampler.prompts, seed), strict=True):
            later = draw.sample(range(1, len(reply)), min(settings.per_prompt, len(reply)) - 1) if reply else []
            prefixes += [prompt + reply[:cut] for cut in [0, *sorted(later)]]
        greedy, sampled = sampler.continued(prefixes, seed, greedily=True), sampler.continued(prefixes, seed + 1)
    room = training.max_length
    both = [
        (prefix, one[: room - len(prefix)], other[: room - len(prefix)])
        for prefix, one, other in zip(prefixes, greedy, sampled, strict=True)
        if one != other and len(prefix) < room
    ]
    found = sampler.rewards([prefix + ids for prefix, *two in both for ids in two], standardised=False)
    rows = []
    for (prefix, one, other), first, second in zip(both, found[::2], found[1::2], strict=True):
        wins = draw.random() < 1 / (1 + math.exp(min(700.0, second - first)))
        rows += [{"prompt": prefix, "reply": one, "preferred": int(wins)}]
        rows += [{"prompt": prefix, "reply": other, "preferred": int(not wins)}]
    sampler.write(out, BRANCHES, rows)


def read_rows(folder: Path, name: str) -> list[dict[str, Any]]:
    """The rows of a stage of this file."""
    return read_json_lines(folder / _FILES[name])
