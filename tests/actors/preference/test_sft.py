"""TRL's SFTTrainer as sft jobs build it: the loss is the mean over trained tokens, however rows are
padded, packed or shared out; a resumed run goes on to the bit; in this process, without Ray."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pytest
import torch
from safetensors.torch import load_file

from actors.engines.base import configured_ends
from actors.models.configuration import ModelError
from actors.preference.packed import check_apart
from actors.preference.relay import PreferenceJob
from actors.preference.trainers import build_trainer, export_model
from actors.preference.worker import renamed
from actors.specs import ModelSpec
from aligntune.config.load import load_config
from aligntune.config.preference import PreferenceConfig
from aligntune.data.dropped import Dropped
from aligntune.data.row_tokens import RowTokens
from aligntune.data.taught_tokens import MASKED, packed
from aligntune.preference.trainer import _arguments
from tests.actors.policy_cases import causal_lm
from tests.stand_ins import REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROWS, LONGEST = 8, 24


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


@pytest.fixture(scope="module")
def mixture(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of four experts whose config asks for a loss of its routers, with a tokenizer."""
    folder: Path = tmp_path_factory.mktemp("mixture")
    shutil.copytree(tiny_model, folder, dirs_exist_ok=True)
    causal_lm(
        "Qwen3Moe",
        vocab_size=100,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        output_router_logits=True,
        router_aux_loss_coef=0.02,
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def uncounted(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose class takes no count of a step's tokens, as Gemma 4's that reads images."""
    monkeypatch.setattr("transformers.Qwen3ForCausalLM.accepts_loss_kwargs", False, raising=False)
    return tiny_model


@pytest.fixture(scope="module")
def bart(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose class takes the count and leaves it out of its loss, of tokens not shifted."""
    from transformers import BartConfig, BartForCausalLM

    folder: Path = tmp_path_factory.mktemp("bart")
    shutil.copytree(tiny_model, folder, dirs_exist_ok=True)
    sizes = {"d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "vocab_size": 100}
    config = BartConfig(**sizes, decoder_ffn_dim=16, max_position_embeddings=64, init_std=0.1)
    BartForCausalLM(config).save_pretrained(folder)
    return folder


def made_rows() -> list[tuple[list[int], list[int]]]:
    """Ragged rows of ids and labels: a masked beginning, and a masked part in the middle."""
    rng = random.Random(0)
    made = []
    for row in range(ROWS):
        ids = [rng.randrange(10, 90) for _ in range(6 + 2 * row)]
        asked = rng.randrange(1, 5)
        labels = [MASKED] * asked + ids[asked:]
        labels[-2] = MASKED if row % 2 else labels[-2]
        made.append((ids, labels))
    return made


def made_of(
    model: Path, folder: Path, *overrides: str, steps: int = 1, held_out: bool = False
) -> Any:
    """A trainer of a config with the overrides, which evaluates on the rows that it trains on; it
    has its job as `job`."""
    config = load_config(
        {
            "algorithm": "sft",
            "model": {"name": str(model)},
            "data": {"path": "d"} | ({"eval_path": "e"} if held_out else {}),
            "output_dir": "o",
            "train": {"learning_rate": 1e-3, "scheduler": "constant"},
        },
        overrides,
    )
    assert isinstance(config, PreferenceConfig)
    job = PreferenceJob(
        kind="sft",
        backend=config.backend,
        model=config.model,
        seed=0,
        steps=steps,
        arguments=_arguments(config),
        scratch="s",
        export=str(folder / "model"),
        max_length=LONGEST,
    )
    columns = {
        name: [row[at] for row in made_rows()] for at, name in enumerate(("input_ids", "labels"))
    }
    table = RowTokens(columns, Dropped(), LONGEST, [*range(ROWS)], [], [*range(ROWS)])
    if job.arguments["padding_free"]:
        table = packed(table, LONGEST)
        assert len(table) < ROWS
    rows = pyarrow.table(dict(table.columns))
    trainer = build_trainer(job, rows, rows if held_out else None, folder, lambda: None)
    trainer.job = job
    return trainer


def mean_over_tokens(model: Path) -> tuple[float, float]:
    """The loss of all rows, each alone in float64, and the norm of its gradient."""
    from transformers import AutoModelForCausalLM

    eager = {"experts_implementation": "eager"}  # the others have no float64
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **eager).double()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for ids, labels in made_rows():
        logps = plain(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        for at, label in enumerate(labels[1:]):
            if label != MASKED:
                total, count = total - logps[at, label], count + 1
    loss = total / count
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in plain.parameters() if p.grad is not None]).norm()
    return loss.item(), norm.item()


def first_step(trainer: Any) -> tuple[float, float]:
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    return entry["loss"], entry["grad_norm"]


@pytest.mark.parametrize(
    "shared_out",
    [
        ("train.pairs_per_worker=8",),
        ("train.pairs_per_worker=2", "train.accumulation_steps=4"),
        ("train.pairs_per_worker=8", "algorithm.packing=true"),
        ("train.pairs_per_worker=1", "train.accumulation_steps=8", "algorithm.packing=true"),
    ],
    ids=["padded", "accumulated", "packed", "packed-accumulated"],
)
@pytest.mark.parametrize("model", ["tiny_model", "mixture"])
def test_the_loss_is_the_mean_over_the_trained_tokens_of_a_step(
    request: pytest.FixtureRequest, tmp_path: Path, shared_out: tuple[str, ...], model: str
) -> None:
    folder = request.getfixturevalue(model)
    trainer = made_of(folder, tmp_path, "train.max_grad_norm=1e9", *shared_out)
    assert first_step(trainer) == pytest.approx(mean_over_tokens(folder), rel=1e-5)
    assert trainer.state.log_history[0]["rows"] == ROWS


@pytest.mark.parametrize("model", ["uncounted", "bart"])
def test_the_mean_is_over_the_step_whatever_a_model_makes_of_the_count_of_its_tokens(
    request: pytest.FixtureRequest, tmp_path: Path, model: str
) -> None:
    folder = request.getfixturevalue(model)
    passes = ("train.pairs_per_worker=2", "train.accumulation_steps=4")
    found = first_step(made_of(folder, tmp_path, "train.max_grad_norm=1e9", *passes))
    assert found == pytest.approx(mean_over_tokens(folder), rel=1e-5)


@pytest.mark.parametrize("lora", [(), ("model.lora.r=2",)], ids=str)
def test_what_is_exported_of_a_mixture_says_of_its_routers_what_the_model_said(
    mixture: Path, tmp_path: Path, lora: tuple[str, ...]
) -> None:
    trainer = made_of(mixture, tmp_path, "model.stop_token_ids=[5]", *lora)
    trainer.train()
    export_model(trainer, trainer.job, tmp_path / "scratch")
    assert 5 in configured_ends(ModelSpec(name=str(tmp_path / "model")))
    before, after = (
        json.loads((folder / "config.json").read_text()) for folder in (mixture, tmp_path / "model")
    )
    assert after.keys() == before.keys()
    for name in ("output_router_logits", "router_aux_loss_coef"):
        assert after[name] == before[name]


@pytest.mark.parametrize("lora", [(), ("model.lora.r=2",)], ids=str)
def test_biases_of_routers_are_exported_as_they_were_read(
    tiny_model: Path, tmp_path: Path, lora: tuple[str, ...]
) -> None:
    folder = tmp_path / "mixture"
    shutil.copytree(tiny_model, folder)
    model = causal_lm(
        "Glm4Moe",
        vocab_size=100,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        n_shared_experts=1,
        first_k_dense_replace=1,
    )
    router = model.to(torch.bfloat16).model.layers[1].mlp.gate
    router.e_score_correction_bias = torch.nn.Buffer(torch.full((4,), 1 + 2**-12))
    model.save_pretrained(folder)
    before = load_file(folder / "model.safetensors")
    trainer = made_of(folder, tmp_path, "model.dtype=bfloat16", *lora)
    export_model(trainer, trainer.job, tmp_path / "scratch")
    after = load_file(tmp_path / "model" / "model.safetensors")
    wide = {name for name, tensor in before.items() if tensor.dtype == torch.float32}
    assert wide == {"model.layers.1.mlp.gate.e_score_correction_bias"}
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
        assert after[name].dtype == tensor.dtype, name


def held_out_by_hand(model: Path) -> dict[str, float]:
    """Means over the trained tokens of all rows, each alone in float64."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).double()
    logps, wanted = [], []
    for ids, labels in made_rows():
        with torch.no_grad():
            every = plain(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        kept = torch.tensor(labels[1:]) != MASKED
        logps.append(every[kept])
        wanted.append(torch.tensor(labels[1:])[kept])
    logp, label = torch.cat(logps), torch.cat(wanted)
    return {
        "eval/loss": -logp.gather(1, label[:, None]).mean().item(),
        "eval/policy/token_accuracy": (logp.argmax(1) == label).double().mean().item(),
        "eval/policy/entropy": -(logp.exp() * logp).sum(1).mean().item(),
    }


def held_out(trainer: Any) -> dict[str, float]:
    """The figures of an evaluation."""
    trainer.evaluate()
    found = renamed(trainer.state.log_history[-1])
    return {name: found[name] for name in ("eval/loss", *FIGURES)}


FIGURES = ("eval/policy/token_accuracy", "eval/policy/entropy")
PACKED = "algorithm.packing=true"


@pytest.mark.parametrize(
    "batches",
    [
        ("eval.pairs_per_worker=3",),
        ("eval.pairs_per_worker=8",),
        ("eval.pairs_per_worker=2", PACKED),
    ],
    ids=str,
)
def test_held_out_figures_are_means_over_trained_tokens(
    tiny_model: Path, tmp_path: Path, batches: tuple[str, ...]
) -> None:
    trainer = made_of(tiny_model, tmp_path, *batches, held_out=True)
    assert held_out(trainer) == pytest.approx(held_out_by_hand(tiny_model), rel=1e-4, abs=1e-6)


def of_two_workers(tmp_path: Path, model: Path, work: str) -> str:
    """What the first of two workers says last, which have joined and run `work`."""
    script = f"""
import json, sys
from pathlib import Path
from tests.actors.preference.test_sft import PACKED, first_step, held_out, made_of
model, folder = Path(sys.argv[1]), Path(sys.argv[2])
print(json.dumps({work}))
"""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    common = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(model), str(tmp_path / str(rank))],
            env={**common, "MASTER_PORT": port, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [worker.communicate(timeout=200)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0]
    return said[0].strip().splitlines()[-1]


@pytest.mark.long
def test_two_workers_have_the_loss_of_one(tiny_model: Path, tmp_path: Path) -> None:
    options = "'train.pairs_per_worker=2', 'train.accumulation_steps=2', 'train.max_grad_norm=1e9'"
    said = of_two_workers(tmp_path, tiny_model, f"first_step(made_of(model, folder, {options}))")
    assert json.loads(said) == pytest.approx(mean_over_tokens(tiny_model), rel=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("packed", ["", ", PACKED"], ids=["padded", "packed"])
def test_what_two_workers_hold_out_counts_once(
    tiny_model: Path, tmp_path: Path, packed: str
) -> None:
    """Of the last batches all or most rows are repeats."""
    made = f"made_of(model, folder, 'eval.pairs_per_worker=3'{packed}, held_out=True)"
    said = json.loads(of_two_workers(tmp_path, tiny_model, f"held_out({made})"))
    assert said == pytest.approx(held_out_by_hand(tiny_model), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("changes", [(), ("model.lora.r=2",), ("algorithm.packing=true",)], ids=str)
def test_a_resumed_run_is_the_run_that_was_not_interrupted(
    tiny_model: Path, tmp_path: Path, changes: tuple[str, ...]
) -> None:
    from transformers import TrainerCallback

    class Saving(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_save = state.global_step == 3

    def made() -> Any:
        return made_of(tiny_model, tmp_path, "train.pairs_per_worker=2", *changes, steps=5)

    whole = made()
    whole.add_callback(Saving())
    whole.train()
    again = made()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.state.global_step == 5
    weights = dict(whole.model.named_parameters())
    assert all(torch.equal(weights[name], p) for name, p in again.model.named_parameters())
    counts = [
        [row["num_tokens"] for row in trainer.state.log_history if "num_tokens" in row]
        for trainer in (whole, again)
    ]
    assert counts[0] == counts[1] == sorted(set(counts[0]))


@pytest.mark.long
@pytest.mark.parametrize("lora", [(), ("model.lora.r=2",)], ids=["whole", "lora"])
def test_unsloth_starts_from_the_same_loss_and_moves_all_that_is_trained(
    tiny_model: Path, tmp_path: Path, lora: tuple[str, ...]
) -> None:
    """In a process of its own, which Unsloth patches for good."""
    script = """
import sys
from pathlib import Path
from actors.models.unsloth import import_unsloth
import_unsloth()
from tests.actors.preference.test_sft import first_step, made_of
trainer = made_of(Path(sys.argv[1]), Path(sys.argv[2]), "train.pairs_per_worker=8",
                  "backend=unsloth", *sys.argv[3:], steps=2)
before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
print("first", first_step(trainer)[0])
print("moved", all(bool((p != before[n]).any()) for n, p in trainer.model.named_parameters()
                   if n in before), flush=True)
"""
    ran = subprocess.run(
        [sys.executable, "-c", script, str(tiny_model), str(tmp_path), *lora],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=REPOSITORY,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "moved True" in ran.stdout
    first = float(ran.stdout.rpartition("first ")[2].split()[0])
    assert first == pytest.approx(mean_over_tokens(tiny_model)[0], rel=1e-5)


def test_adapters_are_merged_into_what_is_exported(tiny_model: Path, tmp_path: Path) -> None:
    trainer = made_of(tiny_model, tmp_path, "train.pairs_per_worker=4", "model.lora.r=2", steps=2)
    trainer.train()
    export_model(trainer, trainer.job, tmp_path / "scratch")
    before, after = (load_file(f / "model.safetensors") for f in (tiny_model, tmp_path / "model"))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["architectures"]


def test_a_model_that_lets_packed_rows_see_each_other_is_refused(
    tiny_model: Path, tmp_path: Path
) -> None:
    trainer = made_of(tiny_model, tmp_path, "algorithm.packing=true")
    inner = trainer.model.get_input_embeddings()
    mixing = inner.register_forward_hook(lambda _, __, found: found + found.cumsum(1))
    with pytest.raises(ModelError, match="does not keep the rows of a packed sequence apart"):
        check_apart(trainer)
    mixing.remove()
    check_apart(trainer)


def test_a_model_that_deepspeed_has_yet_to_place_is_tried_where_it_is() -> None:
    class Apart(torch.nn.Embedding):
        """Gives a token the logits of its row, whatever stands beside it."""

        config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=8))

        def forward(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:  # type: ignore[override]
            return SimpleNamespace(logits=super().forward(input_ids))

    elsewhere = SimpleNamespace(device=torch.device("meta"))  # for the GPU of a job
    check_apart(
        SimpleNamespace(model=Apart(8, 8), args=elsewhere, compute_loss_context_manager=nullcontext)
    )
