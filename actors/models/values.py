"""Values of states: a decoder with a scalar head, read at the positions of response tokens.

The value of a response token is that of the state before it, the hidden state its own log-prob is
computed from: no value sees the token it is the baseline of. A padded and a packed batch give the
same numbers. Shapes: B rows, W padded width, N states of the batch, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from actors.messages import GroupTensors, Row, StateValues
from actors.models.attention import on_its_device
from actors.models.configuration import ModelError
from actors.models.inputs import ModelInputs, collate, collate_rows, idle_inputs
from actors.models.logprobs import check_not_random, decoded
from actors.models.reward import new_reward_model
from actors.models.wrapped import TrainedModel
from actors.specs import CriticSpec, ModelSpec


class ValueModel(TrainedModel):
    """A one-label sequence classifier whose `score` head is read at any token of a sequence."""

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        positions: torch.Tensor,
        row_ends: torch.Tensor | None = None,
        longest: int = 0,
    ) -> torch.Tensor:
        """Values [N] of the states after the tokens at `positions`, float32 or wider."""
        hidden = decoded(self.unwrapped, input_ids, position_ids, attention_mask, row_ends, longest)
        hidden = hidden.flatten(0, 1).index_select(0, positions)  # [N, H]
        head = self.unwrapped.score
        # A value in bfloat16 has three digits; where the head's weights have more, use them.
        with torch.autocast(hidden.device.type, enabled=False):
            values = head(hidden.to(head.weight.dtype)).squeeze(-1)
        return values.to(torch.promote_types(values.dtype, torch.float32))


def critic_model(policy: ModelSpec, spec: CriticSpec) -> ModelSpec:
    """The model a critic starts from; it is trained whole, also where the policy has adapters."""
    return policy.renamed(spec.model or policy.name).model_copy(update={"lora": None})


def load_value_model(spec: ModelSpec) -> ValueModel:
    """The critic as it starts, checked, on CPU, dropout off.

    From a reward model, values start as its scores of the text so far; from a causal LM the head
    starts as zeros, so every value does.

    Raises:
        ModelError: the model cannot be loaded or has no scalar head.
    """
    classifier = new_reward_model(spec, seed=0)
    head = getattr(classifier, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise ModelError(
            f"model {spec.name!r} cannot be a critic: {type(classifier).__name__} has no linear "
            "`score` head over its tokens; give critic.model a decoder that has one"
        )
    saved_as = classifier.config.architectures or ()
    if not any(name.endswith(("ForSequenceClassification", "RewardModel")) for name in saved_as):
        nn.init.zeros_(head.weight)
        if head.bias is not None:
            nn.init.zeros_(head.bias)
    return ValueModel(classifier)


def _tried(model: ValueModel, packed: bool) -> ModelInputs:
    """Two short sequences of any tokens."""
    vocabulary = model.unwrapped.config.get_text_config().vocab_size
    draw = np.random.default_rng(0).integers(0, vocabulary, size=(2, 9))
    return collate([(draw[0, :4], draw[0, 4:]), (draw[1, :2], draw[1, 2:])], packed=packed)


def _states(model: ValueModel, inputs: ModelInputs) -> torch.Tensor:
    """The hidden states [N, H] that values are read of."""
    hidden = decoded(
        model.unwrapped,
        inputs.input_ids,
        inputs.position_ids,
        inputs.attention_mask,
        inputs.row_ends,
        inputs.longest,
    )
    return hidden.flatten(0, 1).index_select(0, inputs.positions)


@torch.no_grad()
def check_training(model: ValueModel, name: str) -> None:
    """Whether values are the same whenever they are computed in training mode; the mode stays.

    Raises:
        ModelError: the model draws at random while it trains.
    """
    was_training, inputs = model.training, _tried(model, packed=False)
    device = next(model.parameters()).device
    model.train()
    with on_its_device(model.unwrapped):
        check_not_random(lambda: _states(model, inputs), device, f"critic model {name!r}", "value")
    model.train(was_training)


@torch.no_grad()
def check_packing(model: ValueModel, name: str) -> None:
    """Compare hidden states, since values of a zero head are equal whatever it reads.

    Raises:
        ModelError: sequences packed together see each other.
    """
    with on_its_device(model.unwrapped):
        packed, padded = (_states(model, _tried(model, packed)) for packed in (True, False))
    gap = float((packed - padded).abs().max())
    allowed = max(1e-4, 4 * torch.finfo(padded.dtype).eps) * max(1.0, float(padded.abs().max()))
    if not gap <= 4 * allowed:
        raise ModelError(
            f"critic model {name!r} reads packed sequences differently from padded ones (hidden "
            f"states differ by {gap:.3g}, allowed {4 * allowed:.3g}): set critic.packing to false"
        )


def asked(inputs: ModelInputs) -> dict[str, Any]:
    """The arguments of `ValueModel.forward`: no value depends on what the next token is, and packs
    of a critic have a prompt a row."""
    unasked = ("targets", "pieces")
    return {name: value for name, value in vars(inputs).items() if name not in unasked}


def state_inputs(
    groups: Mapping[int, GroupTensors], rows: Sequence[Row], packed: bool
) -> ModelInputs:
    """Inputs of `rows` at n + 1 states each: before each response token, and after the last."""
    inputs = collate_rows(groups, rows, packed)
    width = inputs.input_ids.shape[1]
    start, positions = 0, []
    for row in rows:
        first = start + len(groups[row.work].prompt_ids) - 1
        states = groups[row.work].lengths[row.completion] + 1
        positions.append(torch.arange(first, first + states))
        start += first - start + states if packed else width
    return replace(inputs, positions=torch.cat(positions))


@torch.no_grad()
def group_values(
    forward: Callable[..., torch.Tensor],
    groups: Mapping[int, GroupTensors],
    batches: Sequence[Sequence[Row]],
    passes: int,
    packed: bool,
    device: torch.device,
) -> dict[int, StateValues]:
    """Values of each group's states. `groups` is keyed by `Row.work`, `batches` hold all its rows.

    `passes` may be more than there are batches: the surplus is run on a token that counts for
    nothing, so that ranks which shard one model gather its weights equally often.
    """
    found = {
        work: StateValues(
            values=np.full(len(group.token_ids), np.nan, dtype=np.float32),
            final=np.full(len(group.lengths), np.nan, dtype=np.float32),
        )
        for work, group in groups.items()
    }
    for index in range(passes):
        rows = batches[index] if index < len(batches) else ()
        inputs = (state_inputs(groups, rows, packed) if rows else idle_inputs()).to(device)
        values = forward(**asked(inputs)).float().cpu().numpy()
        start = 0
        for row in rows:
            length = groups[row.work].lengths[row.completion]
            cut = groups[row.work].completion(row.completion)
            found[row.work].values[cut] = values[start : start + length]
            found[row.work].final[row.completion] = values[start + length]
            start += length + 1
    return found
