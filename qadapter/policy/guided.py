"""A frozen base whose next tokens are chosen with the help of a second reading: `GuidedForCausalLM` (VAS, PITA).

An adapter with a head of one number reads a prefix and one more token and says what this continuation is worth. At each
position the base's k most likely tokens are the candidates, and their logits move by what the head says of them; the
other tokens' logits stay. The candidates of a position are read in one pass in which each sees the prefix and itself.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from qadapter.errors import QAdapterError
from qadapter.policy.adapters import ADAPTER_FILE, adapted, load_adapter, set_adapter_tensors
from qadapter.policy.caches import PassCaches
from qadapter.policy.dial import AS_TRAINED, Dial
from qadapter.policy.files import GUIDE_FILE, forget_kind, saved_dial, write_dial
from qadapter.policy.fingerprint import write_fingerprint
from qadapter.policy.passes import RowPasses, refuse_outputs

HEAD_FILE = Path("value_head") / "value_head.safetensors"
_FORMAT = 1
_TOKENS_OF_A_PASS = 1024  # candidates that are read at once
_SAME = 1e-2  # of hidden states' largest number; half precision rounds by less

Kind = Literal["value", "preference"]


@dataclass(frozen=True, slots=True)
class Guide:
    """How the head's number moves a candidate's logit.

    Attributes:
        kind: `value`: by strength · (V − mean of V over the candidates), as in VAS. `preference`: the head gives the
            log odds z that a reply is preferred, and the logit moves by log E exp(strength · R) with
            R ~ Bernoulli(σ(z)), as in PITA: log(1 + e^(strength + z)) − log(1 + e^z).
        strength: at least 0; 0 is the base.
        top_k: candidates per position.
    """

    kind: Kind
    strength: float
    top_k: int

    def __post_init__(self) -> None:
        if self.kind not in ("value", "preference"):
            raise ValueError(f"the guide's kind is {self.kind!r}; expected 'value' or 'preference'")
        if not 0 <= self.strength < float("inf") or self.top_k < 1:
            raise ValueError(f"strength {self.strength} and top_k {self.top_k}; expected at least 0 and at least 1")

    def offsets(self, numbers: Tensor) -> Tensor:
        """[…, k], what is added to the candidates' logits, from what the head says of them, [..., k]."""
        if self.kind == "value":
            return self.strength * (numbers - numbers.mean(dim=-1, keepdim=True))
        return F.softplus(self.strength + numbers) - F.softplus(numbers)


@dataclass
class GuidedOutput(CausalLMOutputWithPast):
    """What a forward pass returns.

    Attributes:
        loss: [] cross entropy if labels were given.
        logits: [B, T, V] guided logits; absent where only numbers were asked for.
        past_key_values: the cache, if asked for.
        numbers: [B, T] float32, the head's number at each token, if asked for.
    """

    numbers: Tensor | None = None


class GuidedForCausalLM(PreTrainedModel, GenerationMixin):
    """A base, an adapter with a head of one number on it, and the policy that the guide makes of them.

    Attributes:
        peft_model: the base with the adapter, which reads and never writes.
        value_head: from hidden states to a number.
        guide: how the numbers move the logits.
        weight: of the guide's offsets, the dial's value: 0 is the base.
        by_masks: whether candidates are read behind a cached prefix through a mask of their own; otherwise each is a
            sequence of its own, and nothing is cached.
    """

    config_class = PretrainedConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, peft_model: PeftModel, value_head: nn.Linear, guide: Guide) -> None:
        base: Any = peft_model.get_base_model()
        super().__init__(copy.deepcopy(base.config))
        self.peft_model, self.value_head, self.guide = peft_model, value_head, guide
        self.generation_config = copy.deepcopy(base.generation_config)
        self._base_arguments = frozenset(inspect.signature(base.forward).parameters)
        self._no_split_modules = getattr(base, "_no_split_modules", None)
        self._is_stateful = base._is_stateful
        self._passes = RowPasses(peft_model)
        self._base_only = False
        self.weight = 1.0
        self._text_config = base.config.get_text_config(decoder=True)
        self.by_masks = False
        self.train(False)
        self.by_masks = self._masks_work()

    @classmethod
    def from_base(cls, base: PreTrainedModel, peft_config: PeftConfig, guide: Guide) -> GuidedForCausalLM:
        """Put a new, trainable adapter on a base (which is changed in place), and a head that says 0 of everything."""
        width = int(base.get_input_embeddings().weight.shape[1])  # type: ignore[index]
        head = nn.Linear(width, 1).to(next(base.parameters()).device)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        return cls(adapted(base, peft_config), head, guide)

    # ---- files ----------------------------------------------------------------------------------------------------

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        *,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        **_: Any,
    ) -> None:
        """Write a PEFT adapter folder with `guide.json` and the head beside it; `dial.json` if the dial was moved."""
        del state_dict  # the adapter's weights and the head's are here: shards are not gathered
        folder = Path(save_directory)
        self.peft_model.save_pretrained(
            str(folder), safe_serialization=True, is_main_process=is_main_process, save_embedding_layers=False
        )
        if not is_main_process:
            return
        (folder / HEAD_FILE).parent.mkdir(exist_ok=True)
        write_fingerprint(self.peft_model.get_base_model(), folder)
        forget_kind(folder)
        weights = {name: one.detach().cpu().contiguous() for name, one in self.value_head.state_dict().items()}
        save_file(weights, folder / HEAD_FILE)
        (folder / GUIDE_FILE).write_text(json.dumps({"format": _FORMAT, **asdict(self.guide)}, indent=2) + "\n")
        write_dial(folder, self.dial)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        path: str | Path,
        base_model: PreTrainedModel,
        *,
        is_trainable: bool = False,
        allow_base_mismatch: bool = False,
    ) -> GuidedForCausalLM:
        """Load what `save_pretrained` wrote, in eval mode, with the dial that was saved beside it.

        Raises:
            QAdapterError: no such folder, files missing or damaged in it, a saved dial that is no `q-weight`, or
                another base than it was trained on, unless that is allowed.
        """
        folder = Path(path)
        guide = read_guide(folder)
        try:
            weights = load_file(folder / HEAD_FILE)
        except (OSError, SafetensorError) as error:
            raise QAdapterError(f"{folder / HEAD_FILE} cannot be read ({error}). Save the policy again.") from error
        device = next(base_model.parameters()).device
        head = nn.Linear(int(weights["weight"].shape[1]), 1).to(device)
        head.load_state_dict(weights)
        adapted_base = load_adapter(
            base_model, folder, is_trainable=is_trainable, allow_base_mismatch=allow_base_mismatch
        )
        policy = cls(adapted_base, head, guide).eval()
        return policy if is_trainable else policy.moved(saved_dial(folder))

    @property
    def dial(self) -> Dial:
        """Where the dial stands: with `q-weight` v the candidates' logits move v times as far."""
        return Dial("q-weight", self.weight)

    @dial.setter
    def dial(self, dial: Dial | str | Mapping[str, Any] | None) -> None:
        self.weight = guide_weight(Dial.of(dial) or AS_TRAINED)

    def moved(self, dial: Dial | None) -> GuidedForCausalLM:
        """This policy with its dial moved; None: as trained.

        Raises:
            QAdapterError: another kind of dial than `q-weight`, which scales adapters that are the policy themselves.
        """
        self.weight = 1.0 if dial is None else guide_weight(dial)
        return self

    def load_weights(self, folder: Path) -> None:
        """Take the adapter's and the head's weights out of a folder that `save_pretrained` wrote."""
        set_adapter_tensors(self.peft_model, folder / ADAPTER_FILE, "default")
        self.value_head.load_state_dict(load_file(folder / HEAD_FILE))

    # ---- passes ---------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        only_numbers: bool = False,
        dial: Dial | None = None,
        **options: Any,
    ) -> GuidedOutput:
        """Guided logits, or the head's numbers.

        Args:
            input_ids: [B, T] int64; behind a cache, the new tokens.
            attention_mask: [B, tokens in the cache + T].
            position_ids: [B, T].
            past_key_values: this policy's cache; it holds one for the base and one for the adapter.
            labels: [B, T] int64, -100 where there is none: also return the cross entropy of the next tokens.
            use_cache: return a cache.
            logits_to_keep: only the logits of the last so many positions (0: all), or of these.
            only_numbers: [B, T] numbers instead of logits, with gradients.
            dial: for this pass; where the policy's own stands without.
            options: of the loss with labels (`num_items_in_batch`).

        Raises:
            QAdapterError: another dial than `q-weight`, a cache of another kind or without the guide's states, or
                hidden states, attentions, a tuple or embeddings in place of tokens.
        """
        refuse_outputs(options)
        if options.get("inputs_embeds") is not None:
            raise QAdapterError("A guide reads candidates behind tokens: give input_ids, not inputs_embeds.")
        known = past_key_values.get_seq_length() if past_key_values is not None else 0
        mask = attention_mask
        if mask is None:
            mask = torch.ones(len(input_ids), known + input_ids.shape[1], dtype=torch.long, device=input_ids.device)
        if position_ids is None:
            position_ids = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        if only_numbers:
            return GuidedOutput(numbers=self._numbers(self._hidden(input_ids, mask, position_ids)))
        caching = (bool(use_cache) or past_key_values is not None) and self.by_masks
        if caching and any(type(layer) is not DynamicLayer for layer in getattr(past_key_values, "layers", ())):
            raise QAdapterError(
                f"A guide takes its candidates out of its cache again, which {type(past_key_values).__name__} cannot. "
                "Leave cache_implementation and past_key_values out."
            )
        caches = PassCaches.around(past_key_values, 2, self._text_config) if caching else None
        weight = self._weight_of_pass(dial)
        if weight and caches is not None and caches.part(1).get_seq_length() < known:
            raise QAdapterError(
                "The cache was filled with the guide off or its dial at 0, so it lacks the guide's states of the text. "
                "Start with an empty one."
            )
        given: dict[str, Any] = {"input_ids": input_ids, "attention_mask": mask}
        some = isinstance(logits_to_keep, Tensor)  # positions by index: those of the whole are guided
        given |= {"position_ids": position_ids, "use_cache": caching, "logits_to_keep": 0 if some else logits_to_keep}
        if caches is not None:
            given["past_key_values"] = caches.part(0)
        given = {name: value for name, value in given.items() if name in self._base_arguments}
        with self._passes.bare(len(input_ids)):
            logits = self.peft_model(**given).logits
        if weight:
            logits = self._guided(logits.float(), input_ids, mask, position_ids, caches, weight)
        if some:
            logits = logits[:, logits_to_keep]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **options)
        return GuidedOutput(loss=loss, logits=logits, past_key_values=caches)

    def _weight_of_pass(self, dial: Dial | None) -> float:
        """What a pass multiplies the guide's offsets with; 0 where it is the base's."""
        weight = self.weight if dial is None else guide_weight(dial)
        return 0.0 if self._base_only or not self.guide.strength else weight

    def _guided(
        self, logits: Tensor, ids: Tensor, mask: Tensor, position_ids: Tensor, caches: PassCaches | None, weight: float
    ) -> Tensor:
        """The base's logits [B, K, V] of the last K positions, moved `weight` times as far as the guide says."""
        candidates = logits.topk(min(self.guide.top_k, logits.shape[-1]), dim=-1).indices
        if self.by_masks:
            cache = caches.part(1) if caches is not None else DynamicCache(config=self._text_config)
            self._hidden(ids, mask, position_ids, cache)
            hidden = self._behind_prefix(candidates, mask, position_ids, cache)
        else:
            hidden = self._as_sequences(candidates, ids, mask)
        offsets = weight * self.guide.offsets(self._numbers(hidden))
        return logits.scatter_add(-1, candidates, offsets.to(logits.dtype))

    def _behind_prefix(self, candidates: Tensor, mask: Tensor, position_ids: Tensor, cache: Cache) -> Tensor:
        """[B, K, k, H], hidden states of the candidates behind a cached prefix, which is as before afterwards."""
        rows, positions, k = candidates.shape
        length = mask.shape[1]
        own_positions = position_ids[:, -positions:] + 1
        places = torch.arange(length, device=mask.device)
        embeddings: Any = self.get_input_embeddings()
        found = []
        step = max(1, _TOKENS_OF_A_PASS // k)
        for start in range(0, positions, step):
            part = candidates[:, start : start + step]
            count = part.shape[1] * k
            last = length - positions + start + torch.arange(part.shape[1], device=mask.device)  # of each prefix
            sees = (places <= last[:, None]) & mask.bool()[:, None, :]  # [B, positions, length]
            itself = torch.eye(count, dtype=torch.bool, device=mask.device).expand(rows, count, count)
            allowed = torch.cat([sees.repeat_interleave(k, dim=1), itself], dim=-1)
            dtype = embeddings.weight.dtype
            blocked = torch.zeros(allowed.shape, dtype=dtype, device=mask.device)
            blocked = blocked.masked_fill(~allowed, torch.finfo(dtype).min)[:, None]
            where = own_positions[:, start : start + step].repeat_interleave(k, dim=1)
            hidden = self._hidden(part.reshape(rows, count), blocked, where, cache)
            cache.crop(-count)
            found.append(hidden.view(rows, part.shape[1], k, -1))
        return torch.cat(found, dim=1)

    def _as_sequences(self, candidates: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """[B, K, k, H], the same with each candidate at the end of a sequence of its own."""
        rows, positions, k = candidates.shape
        found = []
        for place in range(positions):
            end = ids.shape[1] - positions + place + 1
            whole = torch.cat(
                [ids[:, :end].repeat_interleave(k, dim=0), candidates[:, place].reshape(rows * k, 1)], dim=1
            )
            seen = torch.cat([mask[:, :end], torch.ones_like(mask[:, :1])], dim=1).repeat_interleave(k, dim=0)
            where = (seen.long().cumsum(-1) - 1).clamp(min=0)
            parts = zip(*(one.split(_TOKENS_OF_A_PASS // 4) for one in (whole, seen, where)), strict=True)
            found.append(torch.cat([self._hidden(*part)[:, -1] for part in parts]).view(rows, k, -1))
        return torch.stack(found, dim=1)

    def _hidden(self, ids: Tensor, mask: Tensor, position_ids: Tensor, cache: Cache | None = None) -> Tensor:
        """[B, T, H], last hidden states of the base with the adapter."""
        base: Any = self.peft_model.get_base_model()
        inner = base.base_model
        given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids}
        given |= {"use_cache": cache is not None, "past_key_values": cache}
        takes = inspect.signature(type(inner).forward).parameters
        output = inner(**{name: value for name, value in given.items() if name in takes and value is not None})
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _numbers(self, hidden: Tensor) -> Tensor:
        """What the head says of hidden states; float32."""
        return self.value_head(hidden.to(self.value_head.weight.dtype)).squeeze(-1).float()

    @torch.no_grad()
    def _masks_work(self) -> bool:
        """Whether this base reads candidates behind a cached prefix as it reads sequences, measured on a few tokens.

        Some attention kernels take no mask of this kind, and some layers keep no keys and values of every token.
        """
        if self._passes.cache_name != "past_key_values":
            return False
        cache = DynamicCache(config=self._text_config)
        if any(type(layer) is not DynamicLayer for layer in cache.layers):
            return False
        device = next(self.peft_model.parameters()).device
        generator = torch.Generator().manual_seed(0)
        embeddings: Any = self.get_input_embeddings()
        drawn = torch.randint(0, embeddings.weight.shape[0], (2, 12), generator=generator).to(device)
        ids, candidates = drawn[:, :6], drawn[:, 6:].view(2, 2, 3)
        mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6], device=device)
        where = (mask.cumsum(-1) - 1).clamp(min=0)
        try:
            self._hidden(ids, mask, where, cache)
            behind = self._behind_prefix(candidates, mask, where, cache)
        except (ValueError, RuntimeError, TypeError, IndexError, NotImplementedError, AttributeError):
            return False
        alone = self._as_sequences(candidates, ids, mask)
        return float((behind - alone).abs().max()) <= _SAME * float(alone.abs().max())

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block this model is the base."""
        before = self._base_only
        self._base_only = True
        try:
            yield
        finally:
            self._base_only = before

    # ---- what transformers asks of a model ------------------------------------------------------------------------

    def _supports_default_dynamic_cache(self) -> bool:  # type: ignore[override]
        return self.by_masks

    def generate(self, *args: Any, dial: Dial | None = None, **kwargs: Any) -> Any:
        """GenerationMixin's; where candidates are sequences of their own, every token reads the whole text again.

        Args:
            args, kwargs: of GenerationMixin.
            dial: for this text; where the policy's own stands without.
        """
        if not self.by_masks:
            kwargs["use_cache"] = False
        before, self.weight = self.weight, self.weight if dial is None else guide_weight(dial)
        try:
            return super().generate(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.weight = before

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The base's own."""
        base: Any = self.peft_model.get_base_model()
        return {**base.prepare_inputs_for_generation(input_ids, **kwargs), "use_cache": kwargs.get("use_cache")}

    def get_input_embeddings(self) -> nn.Module:
        """The base's."""
        base: Any = self.peft_model.get_base_model()
        found: nn.Module = base.get_input_embeddings()
        return found

    def get_output_embeddings(self) -> nn.Module:
        """The base's."""
        base: Any = self.peft_model.get_base_model()
        found: nn.Module = base.get_output_embeddings()
        return found


def guide_weight(dial: Dial) -> float:
    """What a dial multiplies the guide's offsets with.

    Raises:
        QAdapterError: the dial is of another kind.
    """
    if not dial.as_trained and dial.kind != "q-weight":
        raise QAdapterError(
            f"the dial {dial.kind} scales an adapter's weights, and this adapter only guides the base's decoding; "
            f"use q-weight={dial.value:g}"
        )
    return dial.value


def read_guide(folder: Path) -> Guide:
    """`guide.json` of a folder.

    Raises:
        QAdapterError: there is none, or it holds something else.
    """
    file = folder / GUIDE_FILE
    try:
        content = json.loads(file.read_text())
        if content.pop("format") != _FORMAT:
            raise ValueError(f"another format than {_FORMAT}")
        return Guide(**content)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise QAdapterError(f"{file} cannot be read: {error!r}. Save the policy again.") from error
