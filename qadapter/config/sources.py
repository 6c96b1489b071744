"""The sources of preference records."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from qadapter.config.base import Count, Settings


class ToyWorldSettings(Settings):
    """A toy world to generate (`qadapter/toyworld/world.py`); `{data}` in paths is then its folder."""

    seed: int = 0
    corpus_size: Count = Field(20_000, description="pre-training conversations")
    harmful_for_training: Count = Field(
        80, lt=128, description="harmful requests, of 128, in the preference data; the rest are held out"
    )


class ReadingSettings(Settings):
    """Choices that preference data leave open; docs/data.md describes when each is needed."""

    fields: dict[str, Any] | None = Field(None, description="keys of prompt and replies, if no layout is recognised")
    preferred: str | None = Field(None, description="which of two judgements counts: better_response_id")
    score: str | None = Field(None, description="which of several scores counts: fine-grained_score")
    pairing: Literal["all", "first", "none"] | None = Field(
        None, description="pair single labelled replies by their prompt, or keep them single (none; kto only)"
    )
    ranking: Literal["all", "neighbours"] = Field("all", description="pairs of a ranked list: all, or neighbours only")
    ties: Literal["keep", "drop"] = Field("keep", description="pairs whose scores are equal or against the decision")
    min_margin: Annotated[float, Field(ge=0)] | None = Field(None, description="drop pairs with a smaller margin")


class Source(ReadingSettings):
    """Where preference records come from.

    Attributes:
        path: file, folder, URL (http, https or any fsspec scheme) or `hub:owner/name`. `{data}` is the data folder;
            `${NAME}` in a URL is an environment variable, for a password or key.
        heldout_path: a separate source of held-out pairs; without it, `heldout` splits `path` by prompt.
        domain: for DSP records, the preferred style.
        fields, preferred, score, pairing, ranking, ties, min_margin: choices that the data leave open (docs/data.md).
        split, revision, config_name: for a data set on the hub.
        heldout: share (below 1) or number of prompts that are held out of training.
        max_train_pairs, max_heldout_pairs: number of pairs kept after the split; None: all.
        max_chars: records with more characters (prompt and reply together) are quarantined.
        judge_pairs: number of pairs (whole prompts) set aside to train the reward model that judges answers.
        public_query: query parameters of the URLs whose literal values are not secrets (for example `id`).
        expected_pairs: number of training pairs of a source that cannot be read yet; used by `make plan` only.
    """

    path: str
    heldout_path: str | None = None
    domain: str | None = None
    split: str | None = None
    heldout_split: str | None = None
    revision: str | None = None
    config_name: str | None = None
    heldout: Annotated[float, Field(gt=0)] = 0.1
    max_train_pairs: Count | None = None
    max_heldout_pairs: Count | None = None
    max_chars: Count = 20_000
    judge_pairs: Annotated[int, Field(ge=0)] = 0
    public_query: tuple[str, ...] = ()
    expected_pairs: Count | None = None

    @model_validator(mode="after")
    def _check(self) -> Source:
        if self.heldout >= 1 and self.heldout != int(self.heldout):
            raise ValueError(f"heldout is a share below 1 or a whole number of prompts, not {self.heldout}")
        return self
