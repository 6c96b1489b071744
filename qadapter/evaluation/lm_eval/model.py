"""lm-eval's model class for policies: a policy in memory, or a Q-Adapter's folder, as a Hugging Face model."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, get_args

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator
from transformers import PreTrainedTokenizerBase

from qadapter.config.model import ModelSettings
from qadapter.config.open_settings import LOADING
from qadapter.errors import QAdapterError, nearest
from qadapter.inference.score import by_length
from qadapter.policy.base import fit_tokenizer, load_tokenizer
from qadapter.policy.dial import Dial
from qadapter.policy.files import GUIDE_FILE, load_base_of
from qadapter.policy.guided import GuidedForCausalLM
from qadapter.policy.loading import quantization_config
from qadapter.policy.log_probs import token_terms
from qadapter.policy.model import QAdapterForCausalLM
from qadapter.policy.positions import position_limit
from qadapter.policy.scored_states import scored_states
from qadapter.policy.tokenizer import difference, policy_tokenizer
from qadapter.preferences.tokenize import embeddings_of
from qadapter.progress.kept import computed
from qadapter.progress.reports import Work, counted, listening

log = logging.getLogger(__name__)

_OF_THE_POLICY = ("dial", "allow_base_mismatch")
_OF_THE_BASE = (
    *("base", "dtype", "quantization", "load_in_8bit", "load_in_4bit", "revision", "trust_remote_code"),
    *LOADING,
)
# Those of `hf` that it looks at where the model is there already; it would take the others and do nothing with them.
_OF_HF = (
    "tokenizer",
    "batch_size",
    "max_batch_size",
    "max_length",
    "truncation",
    "logits_cache",
    "softmax_dtype",
    "mixed_precision_dtype",
    "add_bos_token",
    "prefix_token_id",
    "enable_thinking",
    "think_end_token",
    "chat_template_args",
)
_QUANTIZATIONS = get_args(ModelSettings.model_fields["quantization"].annotation)
_DTYPES = ("auto", *get_args(ModelSettings.model_fields["dtype"].annotation))


def require_chat_template(tokenizer: Any) -> None:
    """Refuse an evaluation with a chat template if the tokenizer has none.

    Raises:
        QAdapterError: the tokenizer has none.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise QAdapterError(
            "The model's tokenizer has no chat template, and the evaluation asks with one. Set "
            "`tokenizer.chat_template` to the template the model was trained with, or ask these "
            "tasks without one: `evaluation.retention.plain_tasks` in a config, `plain_tasks` in Python, "
            "`--plain_tasks` (or no `--apply_chat_template`) on the command line."
        )


@register_model("qadapter")
class PolicyLM(HFLM):
    """lm-eval's `hf` model over a ready module, silent, with clear errors and a count of shortened prompts.

    A Q-Adapter policy needs nothing more: its one `forward` returns the combined logits, which is what `hf` scores
    and generates from. Scores are those of `hf` to the last digit, so every method of a comparison goes through here.

    Attributes:
        shortened: requests whose prompt did not fit into the model's context and lost its beginning.
    """

    add_bos_token: bool | None
    batch_size_per_gpu: Any

    def __init__(
        self,
        pretrained: Any = None,
        *,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        device: str | None = None,
        apply_chat_template: bool = False,
        **settings: Any,
    ) -> None:
        """Wrap a policy.

        Args:
            pretrained: the policy; or, from a command line, the folder of an adapter of any method.
            tokenizer: the policy's; by default the one that lies with the adapter, else the base's.
            device: device of a loaded policy; without a GPU, always the CPU.
            apply_chat_template: whether prompts will come out of a chat template.
            settings: of `hf`, those that matter for a model in memory (`batch_size`, `max_length` …); with a folder
                also its `dial` (`scale=0.5`, `q-weight=0.75`; as saved with the adapter by default),
                `allow_base_mismatch` (a base that it was not trained on), and what is loaded as its base, and how:
                `base` (folder or hub id; the one that the folder names by default), `dtype` (`auto` by default),
                `quantization` (or `load_in_8bit`, `load_in_4bit` for `int8`, `nf4`), `revision`, `trust_remote_code`,
                as in `ModelSettings`.

        Raises:
            QAdapterError: an argument that would be ignored, or whose value nothing is known to do with; no Q-Adapter
                in the folder; a base that cannot be loaded; a chat template that is needed and not there.
        """
        if pretrained is None:
            raise QAdapterError("No model was given. Name an adapter's folder: --model_args pretrained=FOLDER.")
        known = (*_OF_THE_POLICY, *_OF_THE_BASE, *_OF_HF) if isinstance(pretrained, str) else _OF_HF
        _refuse_ignored([name for name in settings if name not in known], known)
        if isinstance(pretrained, str):
            # lm-eval's command line requests a GPU by default; `hf` falls back to the CPU in the same way.
            place = torch.device(device or "cuda") if torch.cuda.is_available() else torch.device("cpu")
            loading = {name: settings.pop(name) for name in _OF_THE_BASE if name in settings}
            base, dial = loading.pop("base", None), Dial.of(settings.pop("dial", None))
            further = {name: loading.pop(name) for name in LOADING if name in loading}
            options = {**_base_options(**loading), **further}
            folder, mismatch = pretrained, bool(settings.pop("allow_base_mismatch", False))
            options["device_map"] = {"": place}
            if (Path(folder) / GUIDE_FILE).is_file():
                network = load_base_of(Path(folder), base, options)
                pretrained = GuidedForCausalLM.from_pretrained(folder, network, allow_base_mismatch=mismatch)
            else:
                pretrained = QAdapterForCausalLM.from_pretrained(folder, base, allow_base_mismatch=mismatch, **options)
            pretrained.dial = dial or pretrained.dial
            if tokenizer is None:
                of_base = {name: options[name] for name in ("revision", "trust_remote_code")}
                its = load_tokenizer(str(pretrained.config.name_or_path), **of_base)
                tokenizer = policy_tokenizer(Path(folder), its)
                if (other := difference(tokenizer, its)) is not None:
                    log.warning("The adapter in %s brings its own tokenizer, with %s; it is used.", folder, other)
        if isinstance(tokenizer, str):
            tokenizer = load_tokenizer(tokenizer)
        if tokenizer is not None:  # else `hf` looks for one beside the model
            tokenizer = fit_tokenizer(tokenizer, pretrained)
        super().__init__(pretrained, tokenizer=tokenizer, backend="causal", **settings)
        self.shortened = 0
        self._texts: Work | None = None  # the texts that are read in windows now
        limit = position_limit(self.config)
        if limit is not None and (self._max_length or 0) > limit:
            raise QAdapterError(f"max_length is {self._max_length}, but the model knows only {limit} positions.")
        if apply_chat_template:
            self._expect_template()

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """As the parent's; its command line asks it before anything is scored, and tells a model of it nowhere else."""
        if chat_template:
            self._expect_template()
        return super().chat_template(chat_template)

    @property
    def max_length(self) -> int:
        """The model's context, prompt and answer together, in tokens.

        A stretched rope counts with its factor, which `hf` leaves out. For a model without a limit it is `hf`'s own.
        """
        limit = position_limit(self.config)
        if limit is None or self._max_length:
            return int(super().max_length)
        return limit

    def _expect_template(self) -> None:
        require_chat_template(self.tokenizer)
        if self.add_bos_token is None:
            # A template writes its own special tokens, and training tokenises its text without adding any.
            self.add_bos_token = False

    def tok_encode(self, string: str, *arguments: Any, **options: Any) -> list[int]:
        """As the parent's, of texts that the model can read.

        Raises:
            QAdapterError: the text has no token ids, or one that the model has no embedding for.
        """
        try:
            ids: list[int] = super().tok_encode(string, *arguments, **options)
        except (TypeError, UnicodeError) as error:
            raise QAdapterError(
                f"The tokenizer cannot read the text {_shown(string)} of a benchmark ({type(error).__name__}). Leave "
                "such items out of the benchmark."
            ) from error
        if (known := embeddings_of(self.tokenizer)) is not None and ids and max(ids) >= known:
            raise QAdapterError(
                f"The tokenizer makes token id {max(ids)} of the text {_shown(string)} of a benchmark, but the model "
                f"has only {known} embeddings. Leave such items out of the benchmark, or give the tokenizer that the "
                "base was trained with."
            )
        return ids

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> Any:
        """As the parent's, counting the prompts that are longer than `left_truncate_len` tokens."""
        ids, mask = super().tok_batch_encode(strings, padding_side, left_truncate_len=None, truncation=truncation)
        if left_truncate_len is not None and ids.shape[1] > left_truncate_len:
            self.shortened += int((mask.sum(dim=1) > left_truncate_len).sum())
            ids, mask = ids[:, -left_truncate_len:], mask[:, -left_truncate_len:]
        return ids, mask

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """As the parent's, in the same batches, each of them reported and kept (`qadapter.progress`).

        Raises:
            QAdapterError: an answer may be longer than the model's context.
        """
        for longest in {request.args[1].get("max_gen_toks") or self.max_gen_toks for request in requests}:
            if longest >= self.max_length:
                raise QAdapterError(
                    f"Task {requests[0].task_name} lets the model write {longest} tokens, but its context holds "
                    f"{self.max_length} with the prompt. Set a smaller max_new_tokens (lm-eval: max_gen_toks)."
                )
        size = self._decided_size(lambda: self._detect_batch_size())
        order = Collator(
            [(*request.args, place) for place, request in enumerate(requests)],
            sort_fn=lambda item: (-len(self.tok_encode(item[0])), item[0]),
            group_by="gen_kwargs",
            group_fn=lambda item: item[1],
        )
        parts = [[item[-1] for item in chunk] for chunk in order.get_batched(n=size)]
        sampled = any(_samples(request.args[1]) for request in requests)

        def generate(part: list[int]) -> list[str]:
            with self._of_size(size):
                texts: list[str] = super(PolicyLM, self).generate_until([requests[i] for i in part], disable_tqdm=True)
            return texts

        return self._computed(
            "answers of lm-eval", parts, generate, lambda i: [*map(str, requests[i].args)], sampled=sampled
        )

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """As the parent's, without a progress bar."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """As the parent's; it passes a batch of windows at a time to `_loglikelihood_tokens`."""
        size = self._decided_size(lambda: self._detect_batch_size())
        lengths = [len(self.tok_encode(request.args[0])) for request in requests]
        windows = sum(math.ceil(length / self.max_length) for length in lengths)
        with self._of_size(size), counted("texts of lm-eval", "window", windows) as self._texts:
            try:
                return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
            finally:
                self._texts = None

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = True,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """As the parent's, in the same batches, each of them reported and kept (`qadapter.progress`)."""
        for _, _, continuation in requests:
            if len(continuation) > self.max_length:
                raise QAdapterError(
                    f"An answer of {len(continuation)} tokens is longer than the model's context of "
                    f"{self.max_length}. Leave such items out of the benchmark, or use a model with a longer context."
                )

        def detect() -> int:
            longest_first = sorted(requests, key=lambda request: -len(request[1] + request[2]))
            return int(self._detect_batch_size(longest_first, 0))

        size = self._decided_size(detect)
        # lm-eval scores requests that differ in their last token alone in one row, under their common beginning.
        grouped: dict[tuple[int, ...], list[int]] = {}
        for place, (_, context, continuation) in enumerate(requests):
            key = (*context, *continuation[:-1]) if self.logits_cache else (place,)
            grouped.setdefault(key, []).append(place)
        order = Collator(
            [(place, context, continuation) for place, (_, context, continuation) in enumerate(requests)],
            sort_fn=lambda item: (-len(item[1] + item[2]), tuple(item[1] + item[2])),
            group_by="contexts" if self.logits_cache else None,
            group_fn=lambda item: item[1] + item[2][:-1],
        )
        parts = []
        for chunk in order.get_batched(n=size):
            keys = [(*c, *t[:-1]) if self.logits_cache else (place,) for place, c, t in chunk]
            parts.append([place for key in keys for place in grouped[key]])

        def score(part: list[int]) -> list[tuple[float, bool]]:
            some = [requests[i] for i in part]
            with self._of_size(size):
                found: list[tuple[float, bool]] | None = self._scored_by_states(some)
                return found or super(PolicyLM, self)._loglikelihood_tokens(some, disable_tqdm=True)

        self.shortened += sum(len(context) + len(text) > self.max_length + 1 for _, context, text in requests)
        scores = self._computed("likelihoods of lm-eval", parts, score, lambda i: [requests[i][1], requests[i][2]])
        return [(value, greedy) for value, greedy in scores]

    def _computed(
        self,
        work: str,
        parts: list[list[int]],
        compute: Callable[[list[int]], Sequence[Any]],
        content: Callable[[int], Any],
        *,
        sampled: bool = False,
    ) -> list[Any]:
        """The results of all requests, in their order; the requests in `parts` are the batches."""
        before, texts = self.shortened, self._texts

        def batch(place: int) -> list[Any]:
            start = self.shortened
            found = list(compute(parts[place]))
            return [self.shortened - start, found]

        with listening(None) if texts else nullcontext():
            batches = computed(
                work,
                "request",
                [len(part) for part in parts],
                batch,
                lambda place: [content(i) for i in parts[place]],
                sampled=sampled,
            )
        if texts:
            texts.advance(sum(map(len, parts)))
        results: dict[int, Any] = {}
        for part, (_, found) in zip(parts, batches, strict=True):
            results |= zip(part, found, strict=True)
        self.shortened = before + sum(count for count, _ in batches)
        return [results[place] for place in range(len(results))]

    def _decided_size(self, detect: Callable[[], int]) -> int:
        """The batch size: the given one, or for `auto` what fits, the same in all processes and after a kill."""
        if self.batch_size != "auto":
            return int(self.batch_size)
        (size,) = computed("finding the batch size", "trial", [1], lambda _: detect(), lambda _: None, sampled=True)
        return int(size)

    @contextmanager
    def _of_size(self, size: int) -> Iterator[None]:
        """Let the parent use this batch size within the block."""
        before = self.batch_size_per_gpu
        self.batch_size_per_gpu = size
        try:
            yield
        finally:
            self.batch_size_per_gpu = before

    def _scored_by_states(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]]
    ) -> list[tuple[float, bool]] | None:
        """The same as the parent's, for a large vocabulary: logits are made for the answers' tokens only.

        Returns:
            For each request the answer's log-probability and whether it is the likeliest; None where only the model's
            own forward gives its logits.
        """
        whole = [(context + answer)[-(self.max_length + 1) :] for _, context, answer in requests]
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for some in by_length([len(ids) for ids in whole], self.batch_size):
            width = max(len(whole[i]) for i in some)
            ids = torch.zeros((len(some), width), dtype=torch.long, device=self.device)
            mask, scored = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
            for row, i in enumerate(some):
                length, answer = len(whole[i]), len(requests[i][2])
                ids[row, :length] = torch.tensor(whole[i], device=self.device)
                mask[row, :length] = 1
                scored[row, length - answer - 1 : length - 1] = True  # position t predicts token t + 1
            with torch.no_grad():
                states = scored_states(self.model, ids[:, :-1], mask[:, :-1], scored[:, :-1])
                if states is None:
                    return None
                terms = token_terms(*states, ids[:, 1:][scored[:, :-1]].to(states[0].device))
            lengths = [len(requests[i][2]) for i in some]
            parts = zip(terms.log_probs.double().split(lengths), terms.is_top.split(lengths), strict=True)
            for i, (log_probs, is_top) in zip(some, parts, strict=True):
                found[i] = (float(log_probs.sum()), bool(is_top.all()))
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], found[i])
        return found


def _samples(settings: Mapping[str, Any]) -> bool:
    """Whether generation with these settings draws random numbers."""
    return bool(settings.get("do_sample")) or float(settings.get("temperature") or 0) > 0


def _shown(text: str) -> str:
    return ascii(text if len(text) <= 60 else f"{text[:60]}…")


def _refuse_ignored(names: Iterable[str], known: Iterable[str]) -> None:
    """Raise QAdapterError if there are arguments that nothing would be done with."""
    shown = []
    for name in names:
        near = nearest(name, known)
        shown.append(repr(name) + (f" (did you mean {near[0]!r}?)" if near else ""))
    if shown:
        raise QAdapterError(
            f"The model 'qadapter' does not take {', '.join(shown)}: it would make no difference. Its arguments are "
            f"pretrained, device, {', '.join(known)}."
        )


def _base_options(
    dtype: str = "auto",
    quantization: str | None = None,
    load_in_8bit: bool = False,
    load_in_4bit: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """How the base is to be loaded, for `QAdapterForCausalLM.from_pretrained`.

    Raises:
        QAdapterError: an unknown precision or quantization, two of them, or one that is not installed.
    """
    asked = {quantization} if quantization is not None else set()
    asked |= {name for name, wanted in (("int8", load_in_8bit), ("nf4", load_in_4bit)) if wanted}
    if len(asked) > 1:
        raise QAdapterError(f"The base cannot be both {' and '.join(sorted(asked))}. Ask for one quantization.")
    held = next(iter(asked), "none")
    for name, value, known in (("quantization", held, _QUANTIZATIONS), ("dtype", dtype, _DTYPES)):
        if value not in known:
            raise QAdapterError(f"{name} is {value!r}. Give {', '.join(known[:-1])} or {known[-1]}.")
    options: dict[str, Any] = {
        "dtype": dtype,
        "revision": None if revision is None else str(revision),  # lm-eval reads a commit of digits as a number
        "trust_remote_code": trust_remote_code,
    }
    if held != "none":
        numerics = {"quantization": held} | ({} if dtype == "auto" else {"dtype": dtype})
        options["quantization_config"] = quantization_config(
            ModelSettings.model_validate({"pretrained": "base", **numerics})
        )
    return options
