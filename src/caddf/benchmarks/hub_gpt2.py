"""Our causal Transformer as a `transformers` GPT-2 with the same weights: what its `generate` is compared with."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from caddf.decoding import Counts, Frame, Task
from caddf.errors import InputError
from caddf.interface import LanguageModel
from caddf.models.causal_model import CausalModel


def state_of(model: CausalModel) -> dict[str, Tensor]:
    """The weights under `transformers`' names: matrices as [in, out]; queries, keys and values in one."""
    own, branch = model.causal.state_dict(), model.config.branch
    state = {
        "wte.weight": own["embedding.weight"][: model.vocab_size],
        "wpe.weight": own["table.weight"],
        "ln_f.weight": own["norm.weight"],
        "ln_f.bias": own["norm.bias"],
    }
    for i in range(branch.layers):
        old, new = f"layers.{i}", f"h.{i}"
        for kind in ("weight", "bias"):
            query, key_value = (own[f"{old}.attention.{part}.{kind}"] for part in ("query", "key_value"))
            state |= {
                f"{new}.attn.c_attn.{kind}": torch.cat([query, key_value]).movedim(0, -1),
                f"{new}.attn.c_proj.{kind}": own[f"{old}.attention.out.{kind}"].movedim(0, -1),
                f"{new}.mlp.c_fc.{kind}": own[f"{old}.mlp.up.{kind}"].movedim(0, -1),
                f"{new}.mlp.c_proj.{kind}": own[f"{old}.mlp.down.{kind}"].movedim(0, -1),
                f"{new}.ln_1.{kind}": own[f"{old}.attention_norm.{kind}"],
                f"{new}.ln_2.{kind}": own[f"{old}.mlp_norm.{kind}"],
            }
    return {f"transformer.{name}": tensor.contiguous() for name, tensor in state.items()}


def copyable(model: Any) -> bool:
    """Whether `model` is built as GPT-2 is: causal alone, learned positions, biases, GELU."""
    if not isinstance(model, CausalModel):
        return False
    branch = model.config.branch
    return branch.positions == "learned" and branch.bias and branch.activation == "gelu" and not branch.qk_norm


def to_transformers(model: CausalModel) -> Any:
    """A `GPT2LMHeadModel` with copies of the weights; raises `InputError` where `model` is built differently."""
    from transformers import GPT2Config, GPT2LMHeadModel

    if not copyable(model):
        raise InputError(
            "a GPT-2 of transformers has learned positions, biases and GELU; this model is built otherwise"
        )
    branch, like = model.config.branch, model.causal.embedding.weight
    config = GPT2Config(
        vocab_size=model.vocab_size,
        n_positions=model.config.context,
        n_embd=branch.width,
        n_layer=branch.layers,
        n_head=branch.heads,
        bos_token_id=None,
        eos_token_id=None,
    )
    theirs: Any = GPT2LMHeadModel(config)
    theirs = theirs.to(device=like.device, dtype=like.dtype).eval().requires_grad_(False)
    state = state_of(model)
    theirs.load_state_dict({**state, "lm_head.weight": state["transformer.wte.weight"]})
    return theirs


class TransformersGenerate:
    """`generate` of `transformers` as a decoder: BOS and the prompts, all of one length, then one token at a time."""

    def __init__(self, model: CausalModel) -> None:
        self.theirs, self.bos_id = to_transformers(model), model.config.bos_id

    def __call__(self, model: LanguageModel, task: Task, counts: Counts | None = None) -> Any:
        """One frame, the last; draws follow torch's own generator, seeded as the task's first row."""
        rows, length = task.tokens.shape
        new = int(task.wanted[0].sum())
        prompt = torch.nn.functional.pad(task.tokens[:, : length - new], (1, 0), value=self.bos_id)
        yield Frame(self.tokens(prompt, new, task)[:, 1:], task.wanted, self.account(rows, length, new))

    def tokens(self, prompt: Int[Tensor, "B P"], new: int, task: Task) -> Int[Tensor, "B T"]:
        """`prompt` continued by `new` tokens."""
        warp = task.warp
        drawn: dict[str, Any] = {"do_sample": False}
        if warp.temperature > 0:
            torch.manual_seed(task.generators.generators[0].initial_seed())
            drawn = {"do_sample": True, "temperature": warp.temperature, "top_k": warp.top_k, "top_p": warp.top_p}
        mask = torch.ones_like(prompt)
        given = {"attention_mask": mask, "max_new_tokens": new, "pad_token_id": self.bos_id, "use_cache": True}
        tokens: Tensor = self.theirs.generate(prompt, **given, **drawn)
        return tokens

    @staticmethod
    def account(rows: int, length: int, new: int) -> Counts:
        """A pass per token, each position once: what a KV cache leaves to do."""
        counts, needed = Counts.zeros(rows), sum(range(length - new + 1, length + 1))
        counts.add(torch.ones(rows, dtype=torch.bool), causal=new, computed=length, needed=needed, rounds=new)
        return counts
