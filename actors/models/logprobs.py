"""Log-probs and entropies of response tokens, in chunks, so [tokens, vocabulary] never exists.

The decoder gives hidden states; the output head sees at most `tokens_per_chunk` of them at a time,
forwards and backwards, where all but the last are recomputed. A padded and a packed batch give the
same numbers. A model that turns its logits in a way not known here is refused by `check_model`,
never silently wrong.

Shapes: B rows, W padded width, N response tokens of the batch, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from actors.messages import GroupTensors, Row
from actors.models.attention import (
    Pieces,
    causal_alone,
    on_its_device,
    row_arguments,
    without_mask,
)
from actors.models.configuration import ModelError
from actors.models.head import chosen
from actors.models.inputs import collate, collate_rows, idle_inputs
from actors.models.wrapped import TrainedModel
from actors.specs import ModelSpec, rows_at_once


def decoded(
    model: Any,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    row_ends: torch.Tensor | None,
    longest: int,
    pieces: Pieces | None = None,
) -> torch.Tensor:
    """Last hidden states [B, W, H] of a transformers model with a decoder."""
    rows = row_arguments(model, row_ends, longest, pieces)
    with without_mask(rows):
        states: torch.Tensor = model.base_model(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=None if causal_alone(model) else attention_mask,
            use_cache=False,
            **rows,
        ).last_hidden_state
    return states


class LogProbModel(TrainedModel):
    """A causal LM, plain or wrapped by PEFT, that answers with log-probs instead of logits."""

    def __init__(self, model: nn.Module, tokens_per_chunk: int | None) -> None:
        super().__init__(model)
        config = self.causal_lm.config.get_text_config()
        self.tokens_per_chunk = tokens_per_chunk or rows_at_once(
            config.vocab_size, config.hidden_size
        )
        self._softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self._scale = (
            (getattr(config, "logit_scale", None) or 1.0)
            * (getattr(config, "lm_head_multiplier", None) or 1.0)
            / (getattr(config, "logits_scaling", None) or 1.0)
        )

    @property
    def causal_lm(self) -> Any:
        """`unwrapped`, by what it is here."""
        return self.unwrapped

    def chunks(self, tokens: int) -> int:
        """How many calls of the output head `tokens` response tokens take; at least one."""
        return max(1, -(-tokens // self.tokens_per_chunk))

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        positions: torch.Tensor,
        targets: torch.Tensor,
        temperature: float,
        entropy: bool = False,
        chunks: int | None = None,
        row_ends: torch.Tensor | None = None,
        longest: int = 0,
        pieces: Pieces | None = None,
    ) -> tuple[torch.Tensor, None] | torch.Tensor:
        """Log-probs [N] of `targets` at `temperature`, and entropies [N] in nats, float32 or wider.

        The two unpack from a pair without, and from one tensor [2, N] with `entropy`.
        `chunks` fixes the number of head calls: where weights are sharded, every rank has to gather
        the head equally often. A surplus call comes first, on one state, and counts for nothing.
        """
        states = decoded(
            self.causal_lm, input_ids, position_ids, attention_mask, row_ends, longest, pieces
        ).flatten(0, 1)
        hidden = states.index_select(0, positions)  # [N, H]
        needed = self.chunks(len(targets))
        surplus = (chunks or needed) - needed
        if surplus < 0:
            raise ValueError(f"{len(targets)} tokens need {needed} chunks, not {chunks}")
        # Autograd passes over an empty tensor, and with it over the gather of its backward.
        idle = (states[:1], input_ids.flatten()[:1])
        size = self.tokens_per_chunk
        parts = [
            (hidden[i : i + size], targets[i : i + size]) for i in range(0, len(targets), size)
        ]
        calls = [idle] * (surplus + needed - len(parts)) + parts
        found = []
        for index, part in enumerate(calls):
            # Backwards, the last comes first: what it needs may lie there until then.
            if torch.is_grad_enabled() and index < len(calls) - 1:
                found.append(
                    checkpoint(self._chunk, *part, temperature, entropy, use_reentrant=False)
                )
            else:
                found.append(self._chunk(*part, temperature, entropy))
        unused, used = found[: len(calls) - len(parts)], found[len(calls) - len(parts) :]
        empty = states.new_zeros(0, dtype=torch.float32)
        logp = torch.cat([empty, *(logps for logps, _ in used)])
        if unused:
            logp = logp + 0.0 * torch.cat([logps for logps, _ in unused]).sum()
        if not entropy:
            return logp, None
        # One tensor: DeepSpeed counts the outputs that a backward pass reaches, and these counts
        # have to agree between ranks, whose losses may or may not use the entropy.
        return torch.stack([logp, torch.cat([empty, *(spread for _, spread in used)])])

    def _chunk(
        self, hidden: torch.Tensor, targets: torch.Tensor, temperature: float, entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropies [n] from hidden states [n, H]; its [n, V] die with the call."""
        logits = self.causal_lm.get_output_embeddings()(hidden)
        if self._softcap is None:
            return chosen(logits, targets, self._scale / temperature, entropy)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * self._scale
        logits = torch.tanh(logits / self._softcap) * self._softcap
        return chosen(logits, targets, 1 / temperature, entropy)


@torch.no_grad()
def check_model(model: LogProbModel, packing: bool, training: bool = False) -> None:
    """Compare with the model's own logits on a few tokens, before any training leans on it.

    With `training` the log-probs are those of the training mode, and must not be random. New
    adapters add nothing yet, so their dropout does not show.

    Raises:
        ModelError: log-probs differ from those of the model's logits, the model draws at random
            while it trains, or (with `packing`) sequences packed together see each other.
    """
    was_training = model.training
    with on_its_device(model.causal_lm):
        _compare(model, packing, training)
    model.train(was_training)


def _compare(model: LogProbModel, packing: bool, training: bool) -> None:
    causal = model.causal_lm
    vocabulary = causal.get_output_embeddings().weight.shape[0]
    device = next(causal.parameters()).device
    draw = np.random.default_rng(0).integers(0, vocabulary, size=(3, 12))
    sequences = [
        (draw[0, :5], draw[0, 5:]),
        (draw[1, :2], draw[1, 2:9]),
        (draw[2, :3], draw[2, 3:]),
    ]
    inputs = collate(sequences, packed=False).to(device)
    model.eval()
    logits = causal(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        position_ids=inputs.position_ids,
        use_cache=False,
    ).logits.flatten(0, 1)[inputs.positions]
    wanted = logits.float().log_softmax(-1).gather(-1, inputs.targets[:, None]).squeeze(-1)
    precision = max(1e-4, 4 * torch.finfo(logits.dtype).eps) * max(1.0, float(logits.abs().max()))
    model.train(training)

    def padded() -> torch.Tensor:
        found: torch.Tensor = model(**vars(inputs), temperature=1.0)[0]
        return found

    name = type(causal).__name__
    got = check_not_random(padded, device, name, "log-prob") if training else padded()
    gap = float((got - wanted).abs().max())
    if not gap <= precision:
        raise ModelError(
            f"log-probs computed from {name}'s hidden states and output head differ from those of "
            f"its logits by {gap:.3g} (allowed {precision:.3g}): it transforms its logits in a way "
            "that is not supported. Use another model"
        )
    if packing:
        packed, _ = model(**vars(collate(sequences, packed=True).to(device)), temperature=1.0)
        gap = float((packed - wanted).abs().max())
        if not gap <= 4 * precision:
            raise ModelError(
                f"{name} gives packed sequences other log-probs than padded ones (difference "
                f"{gap:.3g}, allowed {4 * precision:.3g}): set policy.packing to false"
            )


def check_not_random(
    compute: Callable[[], torch.Tensor], device: torch.device, name: str, what: str
) -> torch.Tensor:
    """What `compute` gives, where that does not hang on the random stream of `device`; the stream
    stays as it is.

    Raises:
        ModelError: it does hang on it; `name` is who draws at random, and `what` it gives.
    """

    def after(drawn: int) -> torch.Tensor:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.rand(drawn, device=device)
            return compute()

    first = after(0)
    # A kernel's order of adding may make a difference too, but then not by the random stream.
    if not torch.equal(first, after(1)) and torch.equal(first, after(0)):
        raise ModelError(
            f"{name} draws at random while it trains (as routers of experts do that have noise), "
            f"so a {what} would hang on when it is computed: set that noise to 0 in its "
            "config.json where it can be, or use another model"
        )
    return first


@torch.no_grad()
def check_packs(
    forward: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
    model: LogProbModel,
    spec: ModelSpec,
    device: torch.device,
    shared: bool,
) -> None:
    """Compare packs that hold prompts once (`shared`) with packs that repeat them, or these with
    padded rows, by `forward` of `model` on `device`, whose kernels may be others than a CPU's; all
    ranks together.

    Raises:
        ModelError: the log-probs differ.
    """
    model.eval()
    vocabulary = model.causal_lm.config.get_text_config().vocab_size
    draw = np.random.default_rng(0).integers(0, vocabulary, size=60)
    groups = {
        work: GroupTensors(
            group_id=work,
            prompt_ids=draw[:prompt],
            lengths=lengths,
            token_ids=draw[prompt : prompt + sum(lengths)],
            logprobs=np.zeros(sum(lengths), np.float32),
            mask=np.ones(sum(lengths), bool),
        )
        for work, (prompt, lengths) in enumerate([(7, (9, 4, 12)), (3, (1, 20))])
    }
    rows = rows_of(groups)
    layouts = ((True, True), (True, False)) if shared else ((True, False), (False, False))
    pack, plain = (
        forward(**vars(collate_rows(groups, rows, *layout).to(device)), temperature=1.0)[0]
        for layout in layouts
    )
    gap = float((pack - plain).abs().max())
    digits = max(1e-4, 4 * torch.finfo(getattr(torch, spec.dtype)).eps)
    allowed = 4 * digits * max(1.0, float(plain.abs().max()))
    if not gap <= allowed:
        what, other, key = (
            ("completions behind a shared prompt", "behind one of their own", "shared_prompts")
            if shared
            else ("packed rows", "padded ones", "packing")
        )
        raise ModelError(
            f"model {spec.name!r} gives {what} other log-probs than {other} (difference "
            f"{gap:.3g}, allowed {allowed:.3g}): set policy.{key} to false"
        )


@torch.no_grad()
def group_logprobs(
    forward: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
    groups: Mapping[int, GroupTensors],
    batches: Sequence[Sequence[Row]],
    chunks: Sequence[int],
    temperature: float,
    packed: bool,
    device: torch.device,
    shared: bool = False,
) -> dict[int, np.ndarray]:
    """Log-probs [N] float32 of each group, for the rows in `batches`; NaN where a row is in none.

    `groups` is keyed by `Row.work`. `chunks` has a number of head calls per batch; it may be longer
    than `batches`: the surplus is run on a token that counts for nothing, so that ranks which shard
    one model gather its weights equally often.
    """
    found = {
        work: np.full(len(group.token_ids), np.nan, dtype=np.float32)
        for work, group in groups.items()
    }
    for index, count in enumerate(chunks):
        rows = batches[index] if index < len(batches) else ()
        inputs = (collate_rows(groups, rows, packed, shared) if rows else idle_inputs()).to(device)
        logp, _ = forward(**vars(inputs), temperature=temperature, chunks=count)
        values = logp.float().cpu().numpy()
        start = 0
        for row in rows:
            cut = groups[row.work].completion(row.completion)
            found[row.work][cut] = values[start : start + cut.stop - cut.start]
            start += cut.stop - cut.start
    return found


def rows_of(groups: Mapping[int, GroupTensors]) -> list[Row]:
    """Every completion of `groups` as a row."""
    return [
        Row(work, completion, len(group.prompt_ids) + length)
        for work, group in groups.items()
        for completion, length in enumerate(group.lengths)
    ]


def head_calls(
    model: TrainedModel, groups: Mapping[int, GroupTensors], batches: Sequence[Sequence[Row]]
) -> list[int]:
    """The number of head calls that each micro-batch needs."""
    return [
        model.chunks(sum(groups[row.work].lengths[row.completion] for row in batch))
        for batch in batches
    ]
