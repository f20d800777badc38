"""TRL's trainers as preference jobs build them: what each option computes, what is trained in which
precision, and what a resumed run does; in this process, without Ray."""

from __future__ import annotations

import json
import math
import os
import random
import socket
import subprocess
import sys
from ast import literal_eval
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pyarrow
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import logsigmoid, relu

from actors.preference.relay import PreferenceJob
from actors.preference.trainers import (
    _policy_and_reference,
    _whole,
    build_trainer,
    export_model,
)
from actors.preference.worker import renamed
from aligntune.config.load import load_config
from aligntune.config.preference import SMOOTHED, Loss, PreferenceConfig
from aligntune.preference.trainer import _arguments
from tests import drivers
from tests.actors.policy_cases import make_composite_folder, make_model_folder
from tests.conftest import plain_environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

BETA, EPSILON = 0.3, 0.2
PAIRS = 6
Build = Callable[..., Any]


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """One thread, which is quicker for a model as small; transformers leaves the precision of a
    trainer in the environment."""
    before, threads = dict(os.environ), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    os.environ.clear()
    os.environ.update(before)


def table(rows: int = PAIRS, columns: tuple[str, ...] = ("prompt", "chosen", "rejected")) -> Any:
    """Pairs of digits, the two sides of different lengths."""
    rng = random.Random(0)
    lengths = {"prompt": 4, "chosen": 5, "rejected": 3}
    return pyarrow.table(
        {
            f"{name}_ids": [
                [rng.randrange(3, 13) for _ in range(lengths[name] + row % 2 + row // 8)]
                for row in range(rows)
            ]
            for name in columns
        }
    )


def job_of(
    model: Path,
    folder: Path,
    overrides: Iterable[str] = (),
    *,
    kind: Any = "dpo",
    steps: int = 4,
    held_out: int = 0,
) -> PreferenceJob:
    """The job of a config with the overrides."""
    config = load_config(
        {
            "algorithm": kind,
            "model": {"name": str(model)},
            "data": {"path": "d"} | ({"eval_path": "e"} if held_out else {}),
            "output_dir": "o",
            "train": {"pairs_per_worker": PAIRS, "learning_rate": 1e-6},
        },
        overrides,
    )
    assert isinstance(config, PreferenceConfig)
    return PreferenceJob(
        kind=kind,
        backend=config.backend,
        model=config.model,
        seed=config.train.seed,
        steps=steps,
        arguments=_arguments(config),
        scratch="s",
        export=str(folder / "model"),
        max_length=config.data.max_length,
    )


def columns_of(kind: str) -> tuple[str, ...]:
    """What the rows of a job have."""
    return ("prompt", "chosen", "rejected")[kind == "reward_model" :]


def made_of(
    model: Path,
    folder: Path,
    overrides: Iterable[str] = (),
    *,
    kind: Any = "dpo",
    steps: int = 4,
    held_out: int = 0,
    alive: Callable[[], None] = lambda: None,
) -> Any:
    """The trainer of a `job_of`, on so many held-out pairs; it has its job as `job`."""
    job = job_of(model, folder, overrides, kind=kind, steps=steps, held_out=held_out)
    columns = columns_of(kind)
    evaluation = table(held_out, columns) if held_out else None
    trainer = build_trainer(job, table(columns=columns), evaluation, folder, alive)
    trainer.job = job
    return trainer


@pytest.fixture
def build(tiny_model: Path, tmp_path: Path) -> Build:
    """`made_of` the tiny model."""

    def make(*overrides: str, **options: Any) -> Any:
        return made_of(tiny_model, tmp_path, overrides, **options)

    return make


def disturb(trainer: Any) -> None:
    """Move the policy away from its reference, always in the same way."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape, generator=draw)


def batch_of(trainer: Any) -> dict[str, torch.Tensor]:
    """All pairs in one batch."""
    batch: dict[str, torch.Tensor] = trainer.data_collator(list(trainer.train_dataset))
    return batch


def loss_of(trainer: Any) -> float:
    """The loss of all pairs under a disturbed policy."""
    disturb(trainer)
    trainer.model.eval()
    with torch.no_grad():
        return float(trainer.compute_loss(trainer.model, batch_of(trainer)))


class Sides:
    """What the formulas are of: log-probs of every side, in float64, from plain models."""

    def __init__(self, trainer: Any) -> None:
        batch = batch_of(trainer)
        ids, said = batch["input_ids"], batch["completion_mask"][:, 1:].double()
        with torch.no_grad():
            logits, reference = (
                model.double()(input_ids=ids, attention_mask=batch["attention_mask"]).logits
                for model in (trainer.model, trainer.ref_model)
            )
        policy, frozen = (x[:, :-1].double().log_softmax(-1) for x in (logits, reference))
        own = policy.gather(2, ids[:, 1:, None])[..., 0]
        ref = frozen.gather(2, ids[:, 1:, None])[..., 0]
        self.lengths = said.sum(1).chunk(2)
        self.policy = (own * said).sum(1).chunk(2)
        self.reference = (ref * said).sum(1).chunk(2)
        self.nll = -self.policy[0] / self.lengths[0]
        self.ratios = tuple(p - r for p, r in zip(self.policy, self.reference, strict=True))
        # WPO: each token's probability over the sum of the squares of all, averaged as logs
        aligned = (own - policy.exp().square().sum(-1).log()) * said
        chosen, rejected = (aligned.sum(1) / said.sum(1)).exp().chunk(2)
        self.weights = chosen * rejected


def formula(loss: str, sides: Sides, scores: Any = None, eps: float = 0.0) -> torch.Tensor:
    """The loss of each pair as its paper has it; `scores` take the place of the log ratios."""
    c, r = sides.ratios if scores is None else scores
    margin = BETA * (c - r)
    lc, lr = sides.lengths
    match loss:
        case "sigmoid":
            return -logsigmoid(margin)
        case "hinge":
            return relu(1 - margin)
        case "ipo":
            return (c / lc - r / lr - 1 / (2 * BETA)).square()
        case "sigmoid_norm":
            return -logsigmoid(BETA * (c / lc - r / lr))
        case "exo_pair":
            model = torch.stack([margin.sigmoid(), (-margin).sigmoid()])
            wanted = torch.tensor([1 - eps, eps])[:, None]
            return (model * (model / wanted).log()).sum(0)
        case "robust":
            return (-(1 - eps) * logsigmoid(margin) + eps * logsigmoid(-margin)) / (1 - 2 * eps)
        case "nca_pair":
            halves = 0.5 * (logsigmoid(-BETA * c) + logsigmoid(-BETA * r))
            return -logsigmoid(BETA * c) - halves
        case "bco_pair":
            return -logsigmoid(BETA * c) - logsigmoid(-BETA * r)
        case "sppo_hard":
            return (c - 0.5 / BETA).square() + (r + 0.5 / BETA).square()
        case "apo_zero":
            return 1 - (BETA * c).sigmoid() + (BETA * r).sigmoid()
        case "apo_down":
            return (BETA * c).sigmoid() + 1 - margin.sigmoid()
        case "discopop":
            blend = (margin / 0.05).sigmoid()
            return -logsigmoid(margin) * (1 - blend) + (-margin).exp() * blend
        case "aot" | "aot_unpaired":
            if loss == "aot":
                one, other = (x[0] - x[1] for x in (sides.policy, sides.reference))
            else:
                one, other = c, r
            gap = BETA * (one.sort().values - other.sort().values)
            return -(1 - eps) * logsigmoid(gap) - eps * logsigmoid(-gap)
        case "sft":
            return sides.nll
    raise AssertionError(loss)


def test_every_loss_is_that_of_its_paper_and_label_smoothing_is_in_it(build: Build) -> None:
    found = {}
    for loss in get_args(Loss):
        if loss == "sft":
            continue
        for eps in (0.05, EPSILON) if loss in SMOOTHED else (0.0,):
            trainer = build(
                f"algorithm.loss_type={loss}",
                f"algorithm.beta={BETA}",
                f"algorithm.label_smoothing={eps}",
            )
            found[loss, eps] = loss_of(trainer)
            wanted = formula(loss, Sides(trainer), eps=eps).mean()
            assert found[loss, eps] == pytest.approx(float(wanted), rel=1e-4), (loss, eps)
    assert len({round(value, 5) for value in found.values()}) == len(found)


def test_several_losses_are_added_by_their_weights(build: Build) -> None:
    trainer = build(
        "algorithm.loss_type=[sigmoid, sft, apo_zero]",
        "algorithm.loss_weights=[1, 0.5, 2]",
        f"algorithm.beta={BETA}",
    )
    found, sides = loss_of(trainer), Sides(trainer)
    parts = [formula(name, sides).mean() for name in ("sigmoid", "sft", "apo_zero")]
    assert found == pytest.approx(float(parts[0] + 0.5 * parts[1] + 2 * parts[2]), rel=1e-4)
    alone = loss_of(build("algorithm.loss_type=[sigmoid, sft, apo_zero]", f"algorithm.beta={BETA}"))
    assert alone == pytest.approx(float(sum(parts)), rel=1e-4)


def test_the_imitated_answers_weigh_alike_however_a_step_is_shared_out(build: Build) -> None:
    """The better answers of the pairs differ in length, so a mean over the tokens of a pass would
    give another gradient."""
    moves, losses = [], []
    for passes in (1, 2, 6):
        trainer = build(
            "algorithm.loss_type=[sigmoid, sft]",
            "train.learning_rate=1e-3",
            f"train.pairs_per_worker={PAIRS // passes}",
            f"train.accumulation_steps={passes}",
            steps=1,
        )
        trainer.args.max_grad_norm = 0.0  # not clipped
        moves.append(gradient_of_a_step(trainer))
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    for move in moves[1:]:
        torch.testing.assert_close(move, moves[0], atol=1e-6, rtol=1e-4)


def of_two_workers(script: str, model: Path, folder: Path, *more: str) -> list[str]:
    """What each of two processes prints, which `script` has join by its first two arguments."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])

    def work(rank: str) -> str:
        given = [rank, port, str(model), str(folder), *more]
        ran = drivers.run(["-c", script, *given], env=plain_environment(), timeout=240)
        assert ran.returncode == 0, ran.stderr[-2000:]
        return ran.stdout

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(work, "01"))


def gradient_of_a_step(trainer: Any) -> torch.Tensor:
    """What the optimiser sees of the one step that is trained, in one row."""
    from transformers import TrainerCallback

    found: list[torch.Tensor] = []

    class Seen(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            found.append(torch.cat([gradient.flatten().clone() for gradient in gradients]))

    trainer.add_callback(Seen())
    trainer.train()
    (gradient,) = found
    return gradient


def test_a_composite_is_scored_at_each_rows_last_token(tmp_path: Path) -> None:
    words = make_model_folder(tmp_path / "words")
    model = make_composite_folder(tmp_path / "model", words)
    trainer = made_of(model, tmp_path, kind="reward_model")
    pad, tuned = trainer.processing_class.pad_token_id, trainer.model.eval()
    batch = batch_of(trainer)
    with torch.no_grad():
        together = tuned(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits
        rows = [
            ids[mask.bool()]
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        alone = [tuned(input_ids=row[None]).logits[0] for row in rows]
    assert len({len(row) for row in rows}) > 1
    assert pad not in torch.cat(rows)
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-5, rtol=1e-5)
    assert tuned.config.get_text_config().pad_token_id == pad


def test_two_workers_checkpoint_a_model_that_text_reaches_in_part(tmp_path: Path) -> None:
    """DDP would end at the second step, the next after a weight has got no gradient; such weights
    are those of a composite's other parts, and others that no configuration tells of."""
    words = make_model_folder(tmp_path / "words")
    model = make_composite_folder(tmp_path / "model", words)
    script = """
import os, sys
from pathlib import Path
import torch
from tests.actors.preference.test_trainers import made_of
rank, port, model, folder = sys.argv[1:]
os.environ.update(RANK=rank, WORLD_SIZE="2", LOCAL_RANK=rank, MASTER_ADDR="127.0.0.1")
os.environ["MASTER_PORT"] = port
options = ("train.pairs_per_worker=2", "train.workers=2", "model.gradient_checkpointing=true")
trainer = made_of(Path(model), Path(folder) / rank, options, steps=2)
assert trainer.accelerator.num_processes == 2
trainer.model.register_parameter("spare", torch.nn.Parameter(torch.zeros(1)))
trainer.train()
print("reached", trainer.state.global_step, flush=True)
os._exit(0)
"""
    for said in of_two_workers(script, model, tmp_path):
        assert "reached 2" in said.splitlines()


@pytest.mark.parametrize(
    ("divergence", "score"),  # f'(t) of f-DPO (2309.16240), where t is the ratio of the two
    [
        ("forward_kl", lambda x: 1 - (-x).exp()),
        ("js_divergence", lambda x: (2 * x.exp() / (x.exp() + 1)).log()),
        ("alpha_divergence", lambda x: (((0.5 - 1) * x).exp() - 1) / (0.5 - 1)),
    ],
)
def test_another_divergence_takes_the_place_of_the_log_ratio(
    build: Build, divergence: str, score: Any
) -> None:
    trainer = build(f"algorithm.f_divergence={divergence}", f"algorithm.beta={BETA}")
    found, sides = loss_of(trainer), Sides(trainer)
    wanted = formula("sigmoid", sides, [score(x) for x in sides.ratios]).mean()
    assert found == pytest.approx(float(wanted), rel=1e-5)
    assert found != pytest.approx(float(formula("sigmoid", sides).mean()), rel=1e-5)


def test_weighting_multiplies_each_pair_by_its_likelihood(build: Build) -> None:
    trainer = build("algorithm.weighting=true", f"algorithm.beta={BETA}")
    found, sides = loss_of(trainer), Sides(trainer)
    wanted = (formula("sigmoid", sides) * sides.weights).mean()
    assert found == pytest.approx(float(wanted), rel=1e-4)
    assert found != pytest.approx(float(formula("sigmoid", sides).mean()), rel=1e-3)


def test_the_centre_coefficient_weighs_the_square_of_the_sum_of_scores(build: Build) -> None:
    plain = build(kind="reward_model")
    disturb(plain)
    batch = batch_of(plain)
    with torch.no_grad():
        scores = plain.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits[:, 0]
    chosen, rejected = scores.chunk(2)
    ranking = float(-logsigmoid(chosen - rejected).mean())
    assert loss_of(build(kind="reward_model")) == pytest.approx(ranking, rel=1e-5)
    centred = loss_of(build("algorithm.center_coefficient=0.5", kind="reward_model"))
    square = float((chosen + rejected).square().mean())
    assert centred == pytest.approx(ranking + 0.5 * square, rel=1e-5)
    assert square > 1e-6


@pytest.mark.parametrize("side", ["keep_start", "keep_end"])
def test_a_long_pair_is_cut_on_the_side_that_is_named(build: Build, side: str) -> None:
    trainer = build(f"data.long_rows={side}", "data.max_length=7")
    row = trainer.train_dataset[0]
    whole = row["prompt_ids"] + row["chosen_ids"]
    assert len(whole) == 9
    batch = trainer.data_collator([row])
    kept, said = batch["input_ids"][0].tolist(), batch["completion_mask"][0].tolist()
    assert kept == (whole[:7] if side == "keep_start" else whole[-7:])
    assert sum(said) == (3 if side == "keep_start" else 5)


MODELS = {
    "whole": [],
    "lora": ["model.lora.r=2"],
    "checkpointed": ["model.gradient_checkpointing=true"],
}


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def moved(trainer: Any) -> tuple[float, torch.Tensor]:
    """Train; the share of trained weights that changed, and all the changes in one row."""
    before = weights(trainer)
    trainer.train()
    changes = [after - before[name] for name, after in weights(trainer).items()]
    flat = torch.cat([change.flatten() for change in changes])
    return float((flat != 0).double().mean()), flat


@pytest.mark.parametrize(
    ("kind", "model"),
    [
        ("dpo", "whole"),
        ("dpo", "lora"),
        ("reward_model", "whole"),
        ("reward_model", "lora"),
        pytest.param("dpo", "checkpointed", marks=pytest.mark.long),
        pytest.param("reward_model", "checkpointed", marks=pytest.mark.long),
    ],
)
def test_bfloat16_trains_what_float32_does_from_the_same_first_loss(
    build: Build, kind: str, model: str
) -> None:
    shares, steps, losses = {}, {}, {}
    for dtype in ("float32", "bfloat16"):
        trainer = build(f"model.dtype={dtype}", *MODELS[model], kind=kind, steps=3)
        assert {weight.dtype for weight in weights(trainer).values()} == {torch.float32}
        shares[dtype], steps[dtype] = moved(trainer)
        losses[dtype] = next(e["loss"] for e in trainer.state.log_history if "loss" in e)
    if kind == "dpo":
        assert losses["bfloat16"] == pytest.approx(math.log(2), abs=1e-6)
    else:
        assert losses["bfloat16"] == pytest.approx(losses["float32"], abs=0.02)
    assert shares["bfloat16"] == pytest.approx(shares["float32"], abs=0.02)
    alike = torch.nn.functional.cosine_similarity(steps["float32"], steps["bfloat16"], dim=0)
    assert alike > 0.9


@pytest.mark.parametrize("model", ["whole", "lora"])
@pytest.mark.parametrize("kind", ["dpo", "reward_model"])
def test_a_bfloat16_model_is_written_in_bfloat16(
    build: Build, tmp_path: Path, kind: str, model: str
) -> None:
    trainer = build("model.dtype=bfloat16", *MODELS[model], kind=kind)
    names = trainer.accelerator.unwrap_model(trainer.model).state_dict().keys()
    export_model(trainer, trainer.job, tmp_path / "scratch")
    written = load_file(tmp_path / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    if model == "whole":
        assert written.keys() <= set(names)
    else:
        adapter = {path.name for path in (tmp_path / "model" / "adapter").iterdir()}
        assert adapter == {"adapter_config.json", "adapter_model.safetensors"}
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"


def test_tied_weights_are_written_once_in_another_dtype_too(
    tiny_model: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tied = AutoModelForCausalLM.from_pretrained(tiny_model, tie_word_embeddings=True)
    tied.save_pretrained(tmp_path / "tied")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "tied")
    trainer = made_of(tmp_path / "tied", tmp_path, ["model.dtype=bfloat16"])
    export_model(trainer, trainer.job, tmp_path / "scratch")
    before = load_file(tmp_path / "tied" / "model.safetensors")
    written = load_file(tmp_path / "model" / "model.safetensors")
    assert written.keys() == before.keys()
    assert "lm_head.weight" not in written


@pytest.mark.parametrize(
    ("dtype", "model"), [("float32", "whole"), ("bfloat16", "whole"), ("bfloat16", "lora")]
)
def test_precomputed_references_are_those_of_the_trainer_and_in_no_file(
    build: Build, dtype: str, model: str
) -> None:
    signs: list[int] = []
    common = (f"model.dtype={dtype}", "train.pairs_per_worker=4", *MODELS[model])
    trainer = build(
        "algorithm.precompute_reference=true", *common, steps=2, alive=lambda: signs.append(0)
    )
    assert trainer.ref_model is None
    assert len(signs) == 2, "a sign of life for each batch of four"
    assert not trainer.train_dataset.cache_files
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    kept = build(*common, steps=2)
    kept.train()
    wanted = [entry["loss"] for entry in kept.state.log_history if "loss" in entry]
    assert losses == pytest.approx(wanted, abs=1e-6)


def test_an_evaluation_alone_asks_the_reference_of_one_row_to_train_on(build: Build) -> None:
    options = ("algorithm.precompute_reference=true", "eval.pairs_per_worker=4")
    trained = build(*options, held_out=17)
    alone = build(*options, held_out=17, steps=0)
    assert (len(trained.train_dataset), len(alone.train_dataset)) == (PAIRS, 1)
    assert held_out_figures(alone) == pytest.approx(held_out_figures(trained), rel=1e-6)


def test_a_model_in_4_bits_is_scored_against_its_base_in_4_bits_without_adapters(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from actors.models import unsloth
    from actors.models.loading import load_causal_lm

    base = load_causal_lm(job_of(tiny_model, tmp_path).model)
    with torch.no_grad():
        base.lm_head.weight.mul_(0.5)  # rounded, as a stand-in for 4 bits

    def load(spec: Any, max_length: int, seed: int) -> Any:
        assert spec.load_in_4bit
        model = load_causal_lm(spec, lora=True)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_" in name:
                    weight.add_(0.1)
            model.get_output_embeddings().weight.mul_(0.5)
        return model

    monkeypatch.setattr(unsloth, "load_unsloth", load)
    options = ("backend=unsloth", "model.load_in_4bit=true", "model.lora.r=2")
    job = job_of(tiny_model, tmp_path, (*options, "train.resources.gpus=1"), steps=0)
    job = replace(job, trained=str(tiny_model))
    trained, reference = _policy_and_reference(job, {"precompute_ref_log_probs": False})
    tokens = torch.arange(3, 13)[None]
    with torch.no_grad():
        found = reference(tokens).logits
        torch.testing.assert_close(found, base(tokens).logits)
        assert not torch.allclose(found, trained(tokens).logits)


def test_what_is_written_of_a_model_in_4_bits_has_its_buffers(
    tiny_model: Path, tmp_path: Path
) -> None:
    from actors.models.loading import load_causal_lm

    job = job_of(tiny_model, tmp_path, ("model.lora.r=2",))
    model = load_causal_lm(job.model, lora=True)
    layer = model.get_base_model().model.layers[0]
    layer.register_buffer("layer_scalar", torch.tensor([1 + 2**-12]))
    layer.register_buffer("scratch", torch.ones(1), persistent=False)
    before = load_file(tiny_model / "model.safetensors")
    state, _ = _whole(model, job)
    assert state.keys() - before.keys() == {"model.layers.0.layer_scalar"}
    assert torch.equal(state["model.layers.0.layer_scalar"], layer.layer_scalar)


def test_the_seed_draws_the_adapters_and_the_same_one_the_same(build: Build) -> None:
    for kind in ("dpo", "reward_model"):
        drawn = []
        for seed in (0, 0, 1):
            torch.manual_seed(123 + len(drawn))
            trainer = build(f"train.seed={seed}", "model.lora.r=2", kind=kind)
            drawn.append(
                torch.cat([w.flatten() for n, w in weights(trainer).items() if "lora_A" in n])
            )
        assert torch.equal(drawn[0], drawn[1])
        assert not torch.equal(drawn[0], drawn[2])


def in_a_process(script: str, *arguments: str) -> str:
    """What `script` prints, in a process of its own, which DeepSpeed joins to a group for good."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    group = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    joins = f"import os\nos.environ.update({group})\n"
    line = ["-c", joins + script, *arguments]
    ran = drivers.run(line, env=plain_environment(), timeout=240)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.long)])
def test_deepspeed_keeps_float32_weights_beside_the_bfloat16_ones(
    tiny_model: Path, tmp_path: Path, stage: int
) -> None:
    script = """
import os, sys
from pathlib import Path
from tests.actors.policy_cases import watched_placing
from tests.actors.preference.test_trainers import export_model, made_of
os.environ["DS_ACCELERATOR"] = "cpu"
placed = watched_placing()
trainer = made_of(Path(sys.argv[1]), Path(sys.argv[2]), (
    "model.dtype=bfloat16", "train.deepspeed={zero_optimization: {stage: " + sys.argv[3] + "}}"
))
trainer.train()
print("placed", placed)
export_model(trainer, trainer.job, Path(sys.argv[2]) / "scratch")
optimizer = trainer.model_wrapped.optimizer
flat = "single_partition_of_fp32_groups" if sys.argv[3] == "2" else "fp32_partitioned_groups_flat"
print("kept in", {weight.dtype for weight in getattr(optimizer, flat)})
print("first", next(e["loss"] for e in trainer.state.log_history if "loss" in e), flush=True)
os._exit(0)
"""
    said = in_a_process(script, str(tiny_model), str(tmp_path), str(stage))
    assert "kept in {torch.float32}" in said
    if stage == 3:  # or a GPU would have all of policy and reference at once
        assert "placed [0, 0]" in said
    first = float(said.rpartition("first ")[2])
    assert first == pytest.approx(math.log(2), abs=1e-6)
    written = load_file(tmp_path / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}


@pytest.mark.long
def test_a_run_with_deepspeed_goes_on_with_the_settings_of_its_config(
    tiny_model: Path, tmp_path: Path
) -> None:
    script = """
import os, sys
from pathlib import Path
from tests.actors.preference.test_trainers import adam, made_of, rates, saving_at
model, folder, saved, *changes = sys.argv[1:]
changes.append("train.deepspeed={zero_optimization: {stage: 2}}")
trainer = made_of(Path(model), Path(folder), changes)
trainer.add_callback(saving_at(2))
trainer.train(resume_from_checkpoint=saved or None)
print("said", {"rates": rates(trainer), "adam": adam(trainer),
               "clip": trainer.model_wrapped.optimizer.clip_grad}, flush=True)
os._exit(0)
"""
    in_a_process(script, str(tiny_model), str(tmp_path), "", *THEN)
    now = (*NOW, "train.max_grad_norm=0.25")
    saved = str(tmp_path / "checkpoint-2")
    printed = in_a_process(script, str(tiny_model), str(tmp_path), saved, *now)
    said = literal_eval(printed.rpartition("said")[2].strip())
    assert said["rates"] == pytest.approx([1e-3, 0.75e-3, 1e-3, 0.5e-3])
    assert said["adam"] == [(0.5, (0.8, 0.9), 1e-6), (0.0, (0.8, 0.9), 1e-6)]
    assert said["clip"] == 0.25


@pytest.mark.long
@pytest.mark.parametrize("model", ["whole", "lora"])
def test_unsloth_in_bfloat16_starts_from_the_same_first_loss_trains_in_float32_and_goes_on(
    tiny_model: Path, tmp_path: Path, model: str
) -> None:
    """In a process of its own, which Unsloth patches for good."""
    script = """
import sys
from pathlib import Path
from actors.models.unsloth import import_unsloth
import_unsloth()
from tests.actors.preference.test_trainers import made_of, saving_at, weights
model, folder = Path(sys.argv[1]), Path(sys.argv[2])
options = ("model.dtype=bfloat16", "backend=unsloth", *sys.argv[3:])
trainer = made_of(model, folder, options)
trainer.add_callback(saving_at(2))
before = weights(trainer)
trainer.train()
again = made_of(model, folder, options)
again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
print("resumed", all(bool((weights(again)[n] == w).all()) for n, w in weights(trainer).items()))
moved = [bool((weights(trainer)[name] != weight).any()) for name, weight in before.items()]
print("all moved", all(moved), {weight.dtype for weight in before.values()})
print("first", next(e["loss"] for e in trainer.state.log_history if "loss" in e), flush=True)
"""
    ran = subprocess.run(
        [sys.executable, "-c", script, str(tiny_model), str(tmp_path), *MODELS[model]],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[3],
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "resumed True" in ran.stdout
    assert "all moved True {torch.float32}" in ran.stdout
    first = float(ran.stdout.rpartition("first ")[2].split()[0])
    assert first == pytest.approx(math.log(2), abs=1e-6)


def test_the_optimiser_is_named(build: Build) -> None:
    assert build().args.optim == "adamw_torch_fused"


def test_a_constant_rate_has_its_warm_up(build: Build) -> None:
    trainer = build(
        "train.scheduler=constant", "train.warmup_steps=4", "train.learning_rate=1e-3", steps=6
    )
    trainer.train()
    assert rates(trainer) == pytest.approx([0, 0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3])


@pytest.mark.parametrize("kind", ["dpo", "reward_model"])
def test_the_dropout_of_lora_is_what_it_is_set_to_and_the_models_own_is_off(
    build: Build, kind: str
) -> None:
    model = build("model.lora={r: 2, dropout: 0.3}", kind=kind).model
    found = {
        name: module.p
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Dropout)
    }
    assert {p for name, p in found.items() if "lora_dropout" in name} == {0.3}
    assert {p for name, p in found.items() if "lora_dropout" not in name} <= {0.0}


def saving_at(step: int) -> Any:
    """A callback that saves then."""
    from transformers import TrainerCallback

    class Saving(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_save = state.global_step == step

    return Saving()


def rates(trainer: Any) -> list[float]:
    """The learning rates of all steps, those before a checkpoint among them."""
    return [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]


def adam(trainer: Any) -> list[tuple[Any, ...]]:
    """Decay, betas and epsilon of each group of weights."""
    groups = trainer.optimizer.param_groups
    return [(group["weight_decay"], group["betas"], group["eps"]) for group in groups]


THEN = ("train.learning_rate=1e-3", "train.weight_decay=0.1")
NOW = (
    "train.learning_rate=2e-3",
    "train.weight_decay=0.5",
    "train.adam_betas=[0.8, 0.9]",
    "train.adam_epsilon=1e-6",
)


@pytest.mark.parametrize("scheduler", ["constant", "linear"])
def test_a_run_that_goes_on_has_the_rates_and_settings_of_its_config_from_the_next_step_on(
    build: Build, tmp_path: Path, scheduler: str
) -> None:
    schedule = (f"train.scheduler={scheduler}", "train.warmup_steps=1")
    first = build(*schedule, *THEN)
    first.add_callback(saving_at(2))
    first.train()
    whole = build(*schedule, *NOW)
    whole.train()
    again = build(*schedule, *NOW)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert rates(first)[2:] != pytest.approx(rates(whole)[2:])
    assert rates(again) == pytest.approx(rates(first)[:2] + rates(whole)[2:])
    assert adam(again) == adam(whole) != adam(first)


@pytest.mark.parametrize("model", ["whole", "lora"])
@pytest.mark.parametrize("kind", ["dpo", "reward_model"])
def test_a_run_that_is_resumed_at_its_last_step_trains_none(
    build: Build, tmp_path: Path, kind: str, model: str
) -> None:
    changes = ("train.scheduler=constant", "train.learning_rate=1e-3", *MODELS[model])
    split = "train.pairs_per_worker=2"  # three steps an epoch
    for pairs in (split, "train.pairs_per_worker=4"):
        first = build(*changes, pairs, kind=kind, steps=3)
        first.add_callback(saving_at(3))
        first.train()
        again = build(*changes, pairs, kind=kind, steps=3)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert again.state.global_step == 3
        for name, weight in weights(first).items():
            assert torch.equal(weights(again)[name], weight), name
        longer = build(*changes, pairs, kind=kind, steps=4)
        longer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert longer.state.global_step == 4


LORA = ("model.lora={r: 2, dropout: 0.1}", "train.pairs_per_worker=2", "train.learning_rate=1e-3")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("dpo", ()),
        ("dpo", ("algorithm.precompute_reference=true",)),
        ("dpo", ("algorithm.reference_free=true",)),
        ("reward_model", ()),
    ],
    ids=str,
)
def test_a_resumed_run_of_adapters_is_the_run_that_was_not_interrupted(
    build: Build, tmp_path: Path, kind: str, options: tuple[str, ...]
) -> None:
    whole = build(*LORA, *options, kind=kind)
    whole.add_callback(saving_at(2))
    whole.train()
    again = build(*LORA, *options, kind=kind)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, weight in weights(whole).items():
        assert torch.equal(weights(again)[name], weight), name
    assert counted(again) == counted(whole)


def counted(trainer: Any) -> list[float]:
    """The tokens after each step."""
    return [row["num_tokens"] for row in trainer.state.log_history if "num_tokens" in row]


def test_adapters_of_a_checkpoint_that_has_a_copy_for_the_reference_are_read(
    build: Build, tmp_path: Path
) -> None:
    first = build(*LORA, steps=2)
    disturb(first)
    first.model.add_adapter("ref", first.model.peft_config["default"])
    first.add_callback(saving_at(2))
    first.train()
    assert (tmp_path / "checkpoint-2" / "ref" / "adapter_model.safetensors").is_file()
    again = build(*LORA, steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    found = weights(again)
    for name, weight in weights(first).items():
        assert torch.equal(found[name], weight), name


def held_out_figures(trainer: Any) -> dict[str, float]:
    """The figures of an evaluation of a disturbed policy that are of its pairs."""
    disturb(trainer)
    trainer.evaluate()
    found = renamed(trainer.state.log_history[-1])
    return {n: v for n, v in found.items() if n.startswith("eval/") and "time" not in n}


@pytest.mark.parametrize("kind", ["dpo", "reward_model"])
def test_a_held_out_pair_counts_alike_however_pairs_are_batched(build: Build, kind: str) -> None:
    def figures(pairs_per_worker: int) -> dict[str, float]:
        option = f"eval.pairs_per_worker={pairs_per_worker}"
        return held_out_figures(build(option, kind=kind, held_out=17))

    whole = figures(17)
    assert {"eval/loss", "eval/reward/accuracy", "eval/reward/margin"} < whole.keys()
    of_tokens = {"eval/policy/entropy", "eval/policy/token_accuracy", "eval/logits/chosen"}
    assert kind == "reward_model" or of_tokens < whole.keys()
    assert whole["eval/reward/accuracy"] * 17 == pytest.approx(
        round(whole["eval/reward/accuracy"] * 17)
    )
    for batch in (16, 5):
        assert figures(batch) == pytest.approx(whole, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("kind", ["dpo", "reward_model"])
def test_a_held_out_pair_that_two_workers_repeat_counts_once(
    tiny_model: Path, tmp_path: Path, build: Build, kind: str
) -> None:
    """Two processes that have joined; the last batches hold 1 pair of the first and 7 repeats."""
    whole = held_out_figures(build("eval.pairs_per_worker=17", kind=kind, held_out=17))
    script = """
import json, os, sys
from pathlib import Path
from tests.actors.preference.test_trainers import held_out_figures, made_of
rank, port, model, folder, kind = sys.argv[1:]
os.environ.update(RANK=rank, WORLD_SIZE="2", LOCAL_RANK=rank, MASTER_ADDR="127.0.0.1")
os.environ["MASTER_PORT"] = port
options = ("eval.pairs_per_worker=4", "train.workers=2")
trainer = made_of(Path(model), Path(folder) / rank, options, kind=kind, held_out=17)
assert trainer.accelerator.num_processes == 2
figures = held_out_figures(trainer)
(Path(folder) / f"{rank}.json").write_text(json.dumps(figures))
os._exit(0)
"""
    of_two_workers(script, tiny_model, tmp_path, kind)
    for rank in "01":
        figures = json.loads((tmp_path / f"{rank}.json").read_text())
        assert figures == pytest.approx(whole, rel=1e-4, abs=1e-7)
