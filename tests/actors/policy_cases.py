"""What the tests of policy and reference share: a tiny model, groups, jobs, and ranks to run them.

The model is random but not flat: its weights are large enough for log-probs to depend on context.
"""

from __future__ import annotations

import faulthandler
import functools
import multiprocessing
import os
import signal
import socket
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.critic import CriticActor
from actors.messages import GroupTensors, GroupWork, LossTerms, Row, TokenBatch, UpdateJob
from actors.models.logprobs import rows_of
from actors.packing import only_its_own, share_out
from actors.policy import PolicyActor
from actors.specs import CriticSpec, ModelSpec, PolicySpec
from actors.strategies.base import Strategy
from actors.strategies.deepspeed import DeepSpeedStrategy
from actors.strategies.specs import StrategySpec
from aligntune import imports

VOCABULARY = 61
WAIT_S = 240.0  # one process imports torch and DeepSpeed first, on a machine that may be busy
IMPORTED = ("tests.actors.policy_cases", *imports.MODELS, *imports.LORA, *imports.DEEPSPEED)
IMPORTED += (*imports.FSDP, "transformers.models.qwen3.modeling_qwen3", "ray")


def causal_lm(family: str = "Qwen3", seed: int = 0, **options: Any) -> Any:
    """A causal LM of some thousand weights in float32, in eval mode."""
    import transformers

    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 128,
            "initializer_range": 0.1,
            "tie_word_embeddings": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
        | options
    )
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def make_model_folder(folder: Path, word: str = "w") -> Path:
    """The tiny model and a tokenizer of words w3, w4 and so on, in Hugging Face format."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    causal_lm().save_pretrained(folder)
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {f"{word}{i}": i for i in range(3, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=f"{word}3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token=f"{word}3"
    ).save_pretrained(folder)
    return folder


def make_composite_folder(folder: Path, words: Path) -> Path:
    """A tiny Gemma 3 that reads images too, with the tokenizer of `words`; as in many a composite
    its text part names no padding."""
    from transformers import AutoTokenizer, Gemma3Config, Gemma3ForConditionalGeneration

    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "initializer_range": 0.1,
    }
    text = {"vocab_size": VOCABULARY, "num_key_value_heads": 1, "head_dim": 8}
    tokens = {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
    config = Gemma3Config(
        text_config=sizes | text | tokens,
        vision_config=sizes | {"image_size": 4, "patch_size": 2},
        mm_tokens_per_image=4,
        image_token_index=VOCABULARY - 1,
        boi_token_index=VOCABULARY - 2,
        eoi_token_index=VOCABULARY - 3,
    )
    torch.manual_seed(1)
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(words).save_pretrained(folder)
    return folder


def make_group(
    group_id: int, prompt: int, lengths: Sequence[int], holes: bool = False
) -> GroupTensors:
    """Random tokens, the same for the same arguments; with `holes` some interior mask is 0."""
    draw = np.random.default_rng([group_id, prompt, *lengths])
    total = sum(lengths)
    return GroupTensors(
        group_id=group_id,
        prompt_ids=draw.integers(3, VOCABULARY, prompt).astype(np.int32),
        lengths=tuple(lengths),
        token_ids=draw.integers(3, VOCABULARY, total).astype(np.int32),
        logprobs=draw.normal(-4, 0.3, total).astype(np.float32),
        mask=draw.random(total) > 0.25 if holes else np.ones(total, bool),
    )


def make_jobs(
    groups: Sequence[GroupTensors],
    loss: Callable[[TokenBatch], LossTerms],
    world: int = 1,
    minibatches: int = 1,
    step: int = 1,
    recompute_old: bool = True,
    trained: Callable[[int, int], bool] = lambda group, completion: True,
    with_reference: bool = False,
    rollouts: Callable[[int, int], tuple[int, ...]] = lambda group, rows: tuple(range(rows)),
    whole_rollouts: bool = False,
) -> list[UpdateJob]:
    """One update as each of `world` ranks gets it; `rollouts(group, rows)` owns a group's rows."""
    works: list[GroupWork] = []
    units: list[list[Row]] = []  # of a rollout each
    for index, group in enumerate(groups):
        draw = np.random.default_rng(group.group_id)
        owners = rollouts(index, len(group.lengths))
        count = owners[-1] + 1
        reference = group.logprobs + draw.normal(0, 0.1, len(group.logprobs)).astype(np.float32)
        works.append(
            GroupWork(
                group_id=group.group_id,
                prompt_tokens=len(group.prompt_ids),
                lengths=group.lengths,
                trained=tuple(trained(index, c) for c in range(count)),
                truncated=(False,) * count,
                advantages=tuple(float(a) for a in draw.uniform(0.2, 2.0, count)),
                scores=(0.0,) * count,
                tensors=group,
                reference=reference if with_reference else None,
                rollouts=owners,
            )
        )
        rows = [Row(index, c, len(group.prompt_ids) + n) for c, n in enumerate(group.lengths)]
        units += [[row for row in rows if owners[row.completion] == c] for c in range(count)]
    shares = [share_out(units[part::minibatches], world) for part in range(minibatches)]
    own = [only_its_own(works, [share[rank] for share in shares]) for rank in range(world)]
    return [
        UpdateJob(
            step=step,
            groups=needed,
            minibatches=its_rows,
            loss=loss,
            recompute_old=recompute_old,
            temperature=0.9,
            budget=16,
            whole_rollouts=whole_rollouts,
        )
        for needed, its_rows in own
    ]


def simple_loss(batch: TokenBatch) -> LossTerms:
    """A loss with every denominator in it, the entropy, and no kink."""
    mask = batch.mask.to(batch.logp.dtype)
    ratio = (batch.logp - batch.old).exp()
    token = -ratio * batch.advantages * mask
    row = token.sum(1) / mask.sum(1).clamp(min=1)
    assert batch.entropy is not None
    loss = (
        token.sum() / batch.counts.tokens
        + row.sum() / batch.counts.nonempty_rows
        + token.sum() / (batch.counts.rows * batch.budget)
        - 0.1 * (batch.entropy * mask).sum() / batch.counts.tokens
    )
    drift = ((batch.roll - batch.logp.detach()) * mask).sum()
    return LossTerms(
        loss,
        {"test/drift": (drift, "tokens"), "test/rows": (mask.any(1).double().sum(), "rows")},
        {"test/peak": (batch.logp.detach() * mask).abs().max()},
    )


def policy_spec(**settings: Any) -> PolicySpec:
    """Settings that the algorithm would have filled in."""
    return PolicySpec(
        **{
            "learning_rate": 1e-2,
            "adam_betas": (0.9, 0.999),
            "tokens_per_microbatch": 64,
            "tokens_per_chunk": 16,
            "max_grad_norm": 1e9,
            "start_timeout_s": 120,
            "update_timeout_s": 120,
        }
        | settings
    )


def one_rank(folder: Path, model: dict[str, Any] | None = None, **settings: Any) -> PolicyActor:
    """A started policy of one torch rank."""
    spec = ModelSpec(name=str(folder), **(model or {}))
    actor = PolicyActor(spec, policy_spec(**settings), 0, 1, total_steps=100, seed=0)
    actor.start("", 0)
    return actor


def weights(actor: PolicyActor) -> dict[str, torch.Tensor]:
    """The exported weights, by name."""
    _, bundle = actor.export_weights(0)
    assert bundle is not None
    return {name: tensor.clone() for name, tensor in bundle.items()}


def gradients(strategy: Strategy) -> Iterator[tuple[str, torch.Tensor]]:
    """Whole gradients after the last `backward`, unclipped, wherever a strategy has them; all
    ranks together."""
    for name, parameter in strategy.model.model.named_parameters():
        if isinstance(strategy, DeepSpeedStrategy):
            from deepspeed.utils import safe_get_full_grad

            if parameter.requires_grad:
                yield name, safe_get_full_grad(parameter).detach().cpu().clone()
        elif parameter.grad is not None:
            whole = getattr(parameter.grad, "full_tensor", parameter.grad.detach)
            yield name, whole().clone()


def logprobs_of(
    actor: PolicyActor, groups: Sequence[GroupTensors], temperature: float
) -> list[np.ndarray]:
    """Log-probs [N] float32 of each group, as an update recomputes them; all ranks together."""
    tensors = dict(enumerate(groups))
    found = actor._passes(tensors, rows_of(tensors), temperature)
    return [found[index] for index in sorted(found)]


class Probe:
    """A policy rank whose settings can change between updates, and whose gradients can be seen."""

    def __init__(self, actor: PolicyActor, placed: Sequence[int] = ()) -> None:
        """`placed` are the elements of whole weights that DeepSpeed was given to place."""
        self.actor = actor
        self.placed = list(placed)
        self._step = actor._strategy.step

    def gradient(
        self, job: UpdateJob, tokens_per_microbatch: int, tokens_per_chunk: int, packing: bool
    ) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """Gradients and metrics of an update of one optimiser step that leaves weights alone."""
        actor = self.actor
        actor._spec = actor._spec.model_copy(
            update={"tokens_per_microbatch": tokens_per_microbatch, "packing": packing}
        )
        actor._strategy.model.tokens_per_chunk = tokens_per_chunk
        seen: dict[str, torch.Tensor] = {}

        def watched(learning_rate: float) -> float:
            seen.update(gradients(actor._strategy))
            return self._step(0.0)

        actor._strategy.step = watched  # type: ignore[method-assign]
        try:
            metrics = actor.update(job).metrics
        finally:
            actor._strategy.step = self._step  # type: ignore[method-assign]
        return seen, metrics


def forks() -> ForkServerContext:
    """Makes processes that have imported what ranks import: forks of one that has."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*IMPORTED])
    return context


class RankDied(RuntimeError):
    """A rank's process ended amid a call, with this exit code; below 0 it is a signal's."""

    def __init__(self, rank: int, code: int | None) -> None:
        super().__init__(f"rank {rank} ended with exit code {code}")
        self.code = code


def once_more_after_an_abort(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test of several ranks again, once, where glibc aborted one of them.

    Seen once in several hundred runs of FSDP over gloo ("double free or corruption (fasttop)"),
    never when it was looked for. A run goes on after it as after any lost rank; what a test of
    exact numbers says is about the numbers.
    """

    @functools.wraps(test)
    def run(*args: Any, **options: Any) -> None:
        try:
            test(*args, **options)
        except RankDied as died:
            if died.code != -signal.SIGABRT:
                raise
            warnings.warn(f"{test.__name__} runs again: {died}", stacklevel=2)
            test(*args, **options)

    return run


class Ranks:
    """Ranks in processes of their own; `call` runs a function of `Probe` on all."""

    def __init__(
        self,
        folder: Path,
        world: int,
        strategy: StrategySpec,
        model: dict | None = None,
        critic: CriticSpec | None = None,
        **settings: Any,
    ) -> None:
        context = forks()
        with closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        chosen = {"strategy": strategy, "ranks": world}
        spec: PolicySpec | CriticSpec
        if critic is None:
            spec = policy_spec(**chosen, **settings)
        else:
            spec = critic.model_copy(update=chosen)
        model_spec = ModelSpec(name=str(folder), **(model or {}))
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, model_spec, spec, rank, port), daemon=True
            )
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)
        try:
            self._answers()
        except BaseException:
            self.close()
            raise

    def call(self, function: Callable[..., Any], per_rank: Sequence[tuple]) -> list[Any]:
        """`function(probe, *arguments)` on every rank at once; the answers by rank."""
        for pipe, arguments in zip(self._pipes, per_rank, strict=True):
            pipe.send((function, arguments))
        return self._answers()

    def _answers(self) -> list[Any]:
        answers = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(WAIT_S):
                raise TimeoutError(f"rank {rank} did not answer within {WAIT_S} s")
            try:
                failed, answer = pipe.recv()
            except EOFError:
                process = self._processes[rank]
                process.join(30)
                raise RankDied(rank, process.exitcode) from None
            answers.append(RuntimeError(answer) if failed else answer)
        for answer in answers:
            if isinstance(answer, RuntimeError):
                raise answer
        return answers

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join(30)


def watched_placing() -> list[int]:
    """The elements of whole weights that each coming call of `deepspeed.initialize` is given."""
    import deepspeed

    placed: list[int] = []
    initialize = deepspeed.initialize

    def watched(*, model: torch.nn.Module, **options: Any) -> Any:
        placed.append(sum(parameter.numel() for parameter in model.parameters()))
        return initialize(model=model, **options)

    deepspeed.initialize = watched
    return placed


def _serve(
    pipe: Connection, model: ModelSpec, spec: PolicySpec | CriticSpec, rank: int, port: int
) -> None:
    import actors.strategies.deepspeed as strategy

    faulthandler.enable()  # an abort shows where it was
    strategy.WHOLE_BELOW = 0  # or ZeRO-3 would keep all of so small a model on every rank
    torch.set_num_threads(1)
    placed = watched_placing()
    try:
        made: Any = CriticActor if isinstance(spec, CriticSpec) else PolicyActor
        actor = made(model, spec, rank, spec.ranks, total_steps=100, seed=0)
        actor.start("127.0.0.1", port)
        probe = Probe(actor, placed)
        pipe.send((False, None))
    except Exception:  # noqa: BLE001 - the parent raises it
        pipe.send((True, traceback.format_exc()))
        return
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((False, function(probe, *arguments)))
        except Exception:  # noqa: BLE001 - the parent raises it
            pipe.send((True, traceback.format_exc()))
