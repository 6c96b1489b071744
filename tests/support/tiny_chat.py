"""A byte tokenizer with a chat template and Llama models of a few thousand parameters, for tests only."""

from __future__ import annotations

from typing import Literal

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qadapter.policy.model import QAdapterForCausalLM
from qadapter.policy.objective import Objective

Kind = Literal["plain", "peft", "q-adapter"]
KINDS: tuple[Kind, ...] = ("plain", "peft", "q-adapter")

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and one for each role."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<bos>", "<eos>", "<|system|>", "<|user|>", "<|assistant|>"]
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=special[3:],
    )
    fast.chat_template = TEMPLATE
    return fast


def tiny_llama(seed: int = 0, *, hidden: int = 32, context: int = 256, layers: int = 2) -> LlamaForCausalLM:
    """A random Llama for `byte_tokenizer`; 30,000 parameters by default."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=262,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,  # far from uniform, so that greedy answers differ from prompt to prompt
    )
    return LlamaForCausalLM(config).eval()


def tiny_policy(kind: Kind, seed: int = 0) -> torch.nn.Module:
    """A policy of each kind on `tiny_llama()`; adapters are random, so that they differ from their base."""
    if kind == "plain":
        return tiny_llama(seed)
    base = tiny_llama()
    torch.manual_seed(seed)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    if kind == "peft":
        return get_peft_model(base, lora).eval()
    return QAdapterForCausalLM.from_base(base, lora, Objective.preset("residual", alpha_0=0.7)).eval()


def teach(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]], steps: int
) -> None:
    """Fit question-answer pairs, through the chat template, until the model knows them by heart."""
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": q}, {"role": "assistant", "content": a}], tokenize=False
        )
        for q, a in pairs
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(steps):
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
