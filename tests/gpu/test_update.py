"""On a GPU in bfloat16: an update beside its float32 reference on the CPU, the same-loss law,
memory, checkpoints, exports, and what an engine reports."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.messages import GroupTensors, Sampling
from actors.models.inputs import collate
from actors.models.loading import load_causal_lm
from actors.models.logprobs import LogProbModel, rows_of
from actors.policy import PolicyActor
from actors.specs import ModelSpec, RolloutSpec
from aligntune.selftest.work import group_of, job_of, make_model, ragged, sampled_group, started
from tests.actors.policy_cases import Probe

SIZES = {"hidden": 256, "layers": 3, "mlp": 768, "heads": 8, "kv_heads": 2, "vocabulary": 4096}
WIDE = SIZES | {"vocabulary": 151_936}
VALUES = 0.02  # relative error of a gradient or log-prob in bfloat16; its last digit is 0.004
SAME = 0.01  # between two ways to cut the same rows, both in bfloat16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gpu") / "model"
    make_model(path, SIZES)
    return path


@pytest.fixture(scope="module")
def groups() -> list[GroupTensors]:
    return [group_of(i, 24, ragged(8, 120, 400, i), SIZES["vocabulary"]) for i in range(3)]


def rank(folder: Path, dtype: str = "bfloat16", **settings: Any) -> PolicyActor:
    made: PolicyActor = started(folder, dtype, **{"max_grad_norm": 1e9} | settings)
    return made


def cosine_and_ratio(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> Any:
    """Relative distance of two gradients."""
    a, b = (
        torch.cat([part[name].float().cpu().flatten() for name in sorted(wanted)])
        for part in (got, wanted)
    )
    return float((a - b).norm() / b.norm())


def gradient(actor: PolicyActor, groups: list[GroupTensors], *cut: Any) -> Any:
    return Probe(actor).gradient(job_of(groups), *cut)


def test_auto_packs_in_bfloat16_and_says_so(folder: Path) -> None:
    assert rank(folder)._attention == "packed rows, attention by variable length (torch)"
    assert rank(folder, "float32")._attention == "padded rows, sdpa"


def test_an_update_in_bfloat16_is_that_of_float32_on_the_cpu(
    folder: Path, groups: list[GroupTensors], monkeypatch: pytest.MonkeyPatch
) -> None:
    got, figures = gradient(rank(folder), groups, 4096, 1024, True)
    with monkeypatch.context() as away:
        away.setattr(torch.cuda, "is_available", lambda: False)
        reference = rank(folder, "float32")
        wanted, reference_figures = gradient(reference, groups, 4096, 1024, False)
    torch.use_deterministic_algorithms(False)
    distance = cosine_and_ratio(got, wanted)
    print(f"gradient of bfloat16 is {distance:.4f} from float32's")
    assert distance < 2 * VALUES
    assert figures["loss/total"] == pytest.approx(reference_figures["loss/total"], abs=5e-3)
    assert figures["policy/grad_norm"] == pytest.approx(
        reference_figures["policy/grad_norm"], rel=VALUES
    )


CUTS = [(1, 64, True), (700, 100, True), (4096, 4096, True), (700, 100, False), (4096, 64, False)]


def test_the_gradient_does_not_depend_on_microbatches_packing_or_padding(
    folder: Path, groups: list[GroupTensors]
) -> None:
    actor = rank(folder)
    wanted, _ = gradient(actor, groups, 10**6, 10**6, True)
    distances = {
        str(cut): cosine_and_ratio(gradient(actor, groups, *cut)[0], wanted) for cut in CUTS
    }
    print("gradients in bfloat16 differ by", distances)
    assert max(distances.values()) < SAME


def test_in_float32_the_gradient_is_the_same_to_rounding(
    folder: Path, groups: list[GroupTensors]
) -> None:
    actor = rank(folder, "float32", packing=True)
    assert actor._attention == "packed rows, sdpa row by row"
    wanted, _ = gradient(actor, groups, 10**6, 10**6, False)
    for cut in CUTS:
        assert cosine_and_ratio(gradient(actor, groups, *cut)[0], wanted) < 1e-5


def attention_inputs(tokens: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Queries, keys and values [1, heads, tokens, 64] in bfloat16, and the same in float32."""
    parts = [
        torch.randn(1, h, tokens, 64, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for h in (8, 2, 2)
    ]
    return parts, [p.detach().float().requires_grad_() for p in parts]


def assert_alike(
    got: torch.Tensor,
    wanted: torch.Tensor,
    parts: list[torch.Tensor],
    exact: list[torch.Tensor],
) -> None:
    """Values and gradients are those of float32 within what bfloat16 holds."""
    flow = torch.randn_like(wanted)
    (got * flow).sum().backward()
    (wanted * flow).sum().backward()
    pairs = [(got, wanted), *((p.grad, e.grad) for p, e in zip(parts, exact, strict=True))]
    for value, reference in pairs:
        assert float((value.float() - reference).norm() / reference.norm()) < 0.01


@pytest.mark.parametrize("window", [None, 64])
def test_attention_by_length_is_that_of_each_row_alone(tmp_path: Path, window: int | None) -> None:
    from actors.models.attention import _row_by_row, attend

    torch.manual_seed(0)
    lengths = [5, 300, 77, 128, 1]
    ends = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
    parts, exact = attention_inputs(sum(lengths))
    got, _ = attend(
        None, *parts, None, sliding_window=window, cu_seq_lens_q=ends, max_length_q=max(lengths)
    )
    wanted = _row_by_row(*exact, ends, None, window)
    assert_alike(got, wanted, parts, exact)


@pytest.mark.parametrize("window", [None, 64])
def test_attention_by_length_behind_a_shared_prompt_is_that_of_each_row(window: int | None) -> None:
    from actors.models.attention import Pieces, _row_by_row, attend

    torch.manual_seed(0)
    pieces = Pieces((130, 40, 1, 300, 5, 77), (None, 0, 0, 0, None, 4))
    own, seen = (
        torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
        for lengths in (pieces.lengths, pieces.seen)
    )
    parts, exact = attention_inputs(sum(pieces.lengths))
    got, _ = attend(
        None,
        *parts,
        None,
        sliding_window=window,
        cu_seq_lens_q=own,
        cu_seq_lens_k=seen,
        max_length_q=max(pieces.seen),
        pieces=pieces,
    )
    wanted = _row_by_row(*exact, own, None, window, pieces)
    assert_alike(got, wanted, parts, exact)


def test_a_prompt_that_is_computed_once_gives_the_same_gradient(
    folder: Path, groups: list[GroupTensors]
) -> None:
    wanted, _ = gradient(rank(folder), groups, 10**6, 10**6, True)
    shared = rank(folder, shared_prompts=True)
    assert shared._attention.endswith("prompts shared")
    for cut in CUTS[:3]:
        assert cosine_and_ratio(gradient(shared, groups, *cut)[0], wanted) < SAME


def test_chunked_log_probs_are_the_whole_ones_and_never_hold_the_logits(tmp_path: Path) -> None:
    make_model(tmp_path, WIDE)
    causal = load_causal_lm(ModelSpec(name=str(tmp_path), dtype="bfloat16")).cuda()
    draw = np.random.default_rng(0)
    rows = [(draw.integers(2, 90, 32), draw.integers(2, 90, 2016)) for _ in range(2)]
    inputs = vars(collate(rows, packed=False).to(torch.device("cuda")))
    found, peaks = [], []
    for chunk in (256, 10**6):
        model = LogProbModel(causal, chunk)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            logp, _ = model(**inputs, temperature=0.8)
        logp.sum().backward()
        found.append((logp.detach(), causal.lm_head.weight.grad.float().clone()))
        causal.zero_grad()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    whole = 2 * 2016 * WIDE["vocabulary"] * 4  # bytes of the logits in float32
    print(f"peak {peaks[0] / 2**20:.0f} MiB in chunks, {peaks[1] / 2**20:.0f} MiB whole")
    assert float((found[0][0] - found[1][0]).abs().max()) < 1e-3
    assert float((found[0][1] - found[1][1]).norm() / found[1][1].norm()) < SAME
    assert peaks[0] < whole / 2
    assert peaks[1] > whole


def test_a_resumed_policy_has_the_same_weights_and_nearly_the_same_next_gradient(
    folder: Path, groups: list[GroupTensors], tmp_path: Path
) -> None:
    def weights(actor: PolicyActor) -> dict[str, np.ndarray]:
        return dict(actor.export_weights(0)[1].arrays)  # type: ignore[union-attr]

    actor = rank(folder, learning_rate=1e-3)
    actor.update(job_of(groups, 1))
    actor.save(tmp_path)
    at_save = weights(actor)
    other = rank(folder, learning_rate=1e-3)
    other.load(tmp_path)
    for name, array in weights(other).items():
        assert np.array_equal(array, at_save[name]), name
    for name, parameter in actor._strategy.model.named_parameters():
        twin = dict(other._strategy.model.named_parameters())[name]
        assert torch.equal(parameter, twin), name
    first, second = (one.update(job_of(groups, 2)).metrics for one in (actor, other))
    assert first["policy/grad_norm"] == pytest.approx(second["policy/grad_norm"], rel=1e-3)


def test_an_export_loads_in_transformers_with_the_policys_log_probs(
    folder: Path, groups: list[GroupTensors], tmp_path: Path
) -> None:
    actor = rank(folder, learning_rate=1e-4)
    actor.update(job_of(groups, 1))
    actor.save_model(tmp_path / "export")
    other = rank(tmp_path / "export")
    tensors = dict(enumerate(groups))
    mine, its = (one._passes(tensors, rows_of(tensors), 1.0) for one in (actor, other))
    for index in tensors:  # the export is in bfloat16, the trained weights in float32
        assert float(np.abs(mine[index] - its[index]).mean()) < VALUES


def test_the_engine_reports_the_log_probs_of_the_policy(folder: Path) -> None:
    from actors.engines.transformers import TransformersEngine

    prompt = np.arange(5, 37, dtype=np.int32)

    async def sampled() -> Any:
        spec = RolloutSpec(max_prompt_length=64, max_completion_length=96)
        engine = TransformersEngine(ModelSpec(name=str(folder), dtype="bfloat16"), spec, 0, 8, 0)
        await engine.start()
        try:
            return await engine.sample(prompt, Sampling(96, 1.0), 8, "0/0")
        finally:
            await engine.close()

    group = sampled_group(prompt, asyncio.run(sampled()))
    actor = rank(folder)
    gap = np.abs(actor._passes({0: group}, rows_of({0: group}), 1.0)[0] - group.logprobs)
    print(f"engine and policy differ by {gap.mean():.4f} nats, at most {gap.max():.3f}")
    assert gap.mean() < 0.03
