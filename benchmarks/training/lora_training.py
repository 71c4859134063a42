"""Train one adapter with PEFT, a LoRA unless its recipe names another kind, fast enough for two CPU cores."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.helpers import rescale_adapter_scale
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from benchmarks.training.bigbench_tasks import Item
from gpu_worker.front.request.prompts import alpaca_prompt

NO_LABEL = -100
_JUDGED_STEPS = 10
LINEAR_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_IA3_OUTPUTS, _IA3_INPUTS = ("self_attn.k_proj", "self_attn.v_proj"), ("mlp.down_proj",)  # what IA³ scales
Kind = Literal["lora", "dora", "ia3"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """Settings of the training. Steps use `scales` in turn, so that the adapter also works as part of a sum.

    IA³ has neither a rank nor scales, and modules of its own.
    """

    rank: int = 6
    lora_alpha: int = 12
    use_rslora: bool = False
    modules: tuple[str, ...] = LINEAR_NAMES
    first_layer: int = 9
    num_steps: int = 60
    batch_tokens: int = 400
    learning_rate: float = 2e-3
    warmup_share: float = 0.1
    scales: tuple[float, ...] = (1.0, 1 / 3)
    vocabulary_len: int = 16_384
    learnt_loss: float = 0.0  # training ends early once the mean of the last ten losses is below it
    seed: int = 0
    kind: Kind = "lora"


class FrozenLinear(nn.Linear):
    """A linear layer that never learns and multiplies in bfloat16, up to four times as fast as float32."""

    @classmethod
    def of(cls, linear: nn.Linear) -> FrozenLinear:
        frozen = cls(linear.in_features, linear.out_features, bias=False, dtype=torch.bfloat16)
        frozen.weight = nn.Parameter(linear.weight.detach().bfloat16(), requires_grad=False)
        return frozen

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        product: Tensor = _FrozenProduct.apply(x.flatten(0, -2), self.weight)
        return product.unflatten(0, x.shape[:-1])


class _FrozenProduct(torch.autograd.Function):
    """x W^T, and G W in the backward pass, in bfloat16: one graph node instead of five."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:  # (N, in), (out, in) -> (N, out)
        ctx.save_for_backward(weight)
        return (x.bfloat16() @ weight.T).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return (grad.bfloat16() @ weight).to(grad.dtype), None


def freeze_linears(model: nn.Module) -> None:
    """Replace every linear layer of the decoder by a FrozenLinear, in place."""
    for parent in model.get_submodule("model.layers").modules():
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                setattr(parent, name, FrozenLinear.of(child))


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of prompt and answer. Only the answer's tokens have labels, shifted left by one."""

    ids: Tensor
    labels: Tensor


def tokenize(items: Sequence[Item], tokenizer: Any) -> list[Example]:
    """Return one example per item. The answer ends with the end-of-sequence token."""
    prompts = tokenizer([alpaca_prompt(item.input) for item in items])["input_ids"]
    answers = tokenizer([item.answers[0] for item in items], add_special_tokens=False)["input_ids"]
    return [_example(p, [*a, tokenizer.eos_token_id]) for p, a in zip(prompts, answers, strict=True)]


def _example(prompt: list[int], answer: list[int]) -> Example:
    ids = torch.tensor(prompt + answer[:-1])
    labels = torch.tensor([NO_LABEL] * (len(prompt) - 1) + answer)
    return Example(ids, labels)


@dataclass(frozen=True, slots=True)
class Batch:
    """The input of one step: ids and labels (B, T), and further inputs of the decoder.

    With `hidden` (B, T, H), the input of its first layer, the decoder does not read the ids.
    """

    ids: Tensor
    labels: Tensor
    inputs: dict[str, Any] = field(default_factory=dict)
    hidden: Tensor | None = None

    def read_by(self, decoder: nn.Module) -> Tensor:
        """Return the last hidden states (B, T, H)."""
        read = {"input_ids": self.ids} if self.hidden is None else {"inputs_embeds": self.hidden}
        states: Tensor = decoder(**read, use_cache=False, **self.inputs).last_hidden_state
        return states


class Layout(Protocol):
    """The arrangement of a batch's examples in one tensor."""

    def num_tokens(self, examples: Sequence[Example]) -> int: ...

    def batch(self, examples: Sequence[Example]) -> Batch: ...


class Padded:
    """One row per example, padded on the right. Causal attention never reads the padding, so no mask is needed."""

    def num_tokens(self, examples: Sequence[Example]) -> int:
        return len(examples) * max(len(example.ids) for example in examples)

    def batch(self, examples: Sequence[Example]) -> Batch:
        ids = pad_sequence([e.ids for e in examples], batch_first=True)
        labels = pad_sequence([e.labels for e in examples], batch_first=True, padding_value=NO_LABEL)
        return Batch(ids, labels)


def batches(examples: Sequence[Example], recipe: Recipe, layout: Layout) -> Iterator[list[Example]]:
    """Yield shuffled batches without end. Each has at most `batch_tokens` tokens."""
    rng = random.Random(recipe.seed)
    batch: list[Example] = []
    while True:
        for example in rng.sample(examples, len(examples)):
            if batch and layout.num_tokens([*batch, example]) > recipe.batch_tokens:
                yield batch
                batch = []
            batch.append(example)


class AnswerLoss:
    """Cross entropy of the answer tokens over a part of the vocabulary.

    The part has the lowest ids (the tokenizer's most common pieces) and every id of the task. All 262,144 ids would
    cost more than the layers do.
    """

    def __init__(self, embedding: Tensor, examples: Sequence[Example], recipe: Recipe) -> None:
        used = torch.cat([e.ids for e in examples] + [e.labels[e.labels != NO_LABEL] for e in examples])
        ids = torch.cat([torch.arange(min(recipe.vocabulary_len, len(embedding))), used]).unique()
        self._weight = embedding[ids].bfloat16()  # (V, hidden)
        self._position = torch.zeros(len(embedding), dtype=torch.long)
        self._position[ids] = torch.arange(len(ids))

    def __call__(self, hidden: Tensor, labels: Tensor) -> Tensor:  # (B, T, hidden), (B, T) -> ()
        is_answer = labels != NO_LABEL
        logits = hidden[is_answer].bfloat16() @ self._weight.T
        return F.cross_entropy(logits.float(), self._position[labels[is_answer]])


def train_adapter(
    model: nn.Module,
    examples: Sequence[Example],
    recipe: Recipe,
    on_step: Callable[[float], None],
    layout: Layout | None = None,
) -> PeftModel:
    """Return `model` with a trained adapter; `unload()` restores the base. Call `on_step` with each step's loss."""
    torch.manual_seed(recipe.seed)
    peft_model = get_peft_model(model, _peft_config(model, recipe))
    peft_model.train()
    decoder = peft_model.get_base_model().model
    loss_of = AnswerLoss(decoder.embed_tokens.weight, examples, recipe)
    learning = [p for p in peft_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        learning, lr=recipe.learning_rate, fused=True
    )  # otherwise eight operations per tensor
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_share(step, recipe))
    layout, losses = layout or Padded(), deque([math.inf], maxlen=_JUDGED_STEPS)
    for step, chosen in zip(range(recipe.num_steps), batches(examples, recipe, layout), strict=False):
        batch = layout.batch(chosen)
        with _scaled(peft_model, recipe.scales[step % len(recipe.scales)]):
            loss = loss_of(batch.read_by(decoder), batch.labels)
            loss.backward()
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        on_step(losses[-1])
        if sum(losses) < _JUDGED_STEPS * recipe.learnt_loss:
            break
    return peft_model


def _scaled(model: PeftModel, scale: float) -> AbstractContextManager[None]:
    return nullcontext() if scale == 1 else rescale_adapter_scale(model, scale)


def _peft_config(model: nn.Module, recipe: Recipe) -> PeftConfig:
    layers = range(recipe.first_layer, model.config.num_hidden_layers)
    if recipe.kind == "ia3":
        inputs = [f"layers.{layer}.{name}" for layer in layers for name in _IA3_INPUTS]
        outputs = [f"layers.{layer}.{name}" for layer in layers for name in _IA3_OUTPUTS]
        return IA3Config(target_modules=outputs + inputs, feedforward_modules=inputs, task_type="CAUSAL_LM")
    return LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.lora_alpha,
        use_rslora=recipe.use_rslora,
        use_dora=recipe.kind == "dora",
        target_modules=list(recipe.modules),
        layers_to_transform=list(layers),
        task_type="CAUSAL_LM",
    )


def lr_share(step: int, recipe: Recipe) -> float:
    """Return the learning rate's share: linear warm-up, then linear decay to zero."""
    warmup = max(1, round(recipe.warmup_share * recipe.num_steps))
    return min((step + 1) / warmup, (recipe.num_steps - step) / max(1, recipe.num_steps - warmup))
