"""Processor seconds of a vLLM engine until it is ready, and of the tokens that it then makes.

Its process is forked from the one that has imported vLLM, or spawned; it compiles, or does not
(`rollout.engine.compiles`). A start is a process of its own, with a Ray of its own and
the rollout actor of a run: it serves, and has made a first token, before the tokens count, which
are those of one step of tests/bench/end_to_end/work.py. Beside them is bare vLLM, all of it in one
process without Ray. Kinds take turns, round by round. The first round finds no cache of what vLLM
and torch compile, the others those that it has left. Each start is a file, as in
tests/bench/end_to_end/parts.py.

python -m tests.bench engine [--rounds 3] [--parts 1] [--again]
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from pydantic import BaseModel, ConfigDict

from tests.bench.bare_vllm import ALONE
from tests.bench.end_to_end import work as works
from tests.bench.end_to_end.parts import FOLDER, Options, Unfinished
from tests.bench.end_to_end.work import SIX_MILLION, Work
from tests.bench.report import REPOSITORY, Measured, Target, commit
from tests.bench.startup import spent

STARTS = ("forked", "spawned")
MODES = ("eager", "compiled")
Kind = tuple[str, str]
BARE = "bare"
KINDS: tuple[Kind, ...] = tuple(itertools.product((*STARTS, BARE), MODES))
LIMIT_S = 900.0
ENGINE = "VLLM::"  # how vLLM's processes begin their titles


class Start(BaseModel):
    """One engine's life. Processor seconds are those of whole processes, since they began."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    start: str
    mode: str
    work: Work
    commit: str
    load: float  # of the machine, before
    ready_s: float  # wall seconds that the actor's `start` took
    ready_cpu_s: dict[str, float]  # when it was over, by whose process it was
    tokens: int
    tokens_s: float  # wall seconds from there
    tokens_cpu_s: dict[str, float]  # likewise, by whose process it was


def measure(options: Options) -> Measured:
    """Medians over all rounds. Raises Unfinished where starts are left for another call."""
    work = options.of(SIX_MILLION)
    found: dict[Kind, list[Start]] = {kind: [] for kind in KINDS}
    left = made = 0
    for round_ in range(1, options.rounds + 1):
        for kind in KINDS:
            path = FOLDER / "engine" / f"{round_}-{'-'.join(kind)}.json"
            start = None if options.again else there(path, work)
            if start is None and (options.parts is None or made < options.parts):
                print(f"round {round_} of {options.rounds}: {', '.join(kind)}", flush=True)
                begin(kind, work, path, fresh=round_ == 1)
                start, made = there(path, work), made + 1
            if start is None:
                left += 1
            else:
                found[kind].append(start)
    if left:
        raise Unfinished(f"{left} starts are left; run it again")
    return joined(found, targets=options.whole)


def there(path: Path, work: Work) -> Start | None:
    """A start that was measured before and counts."""
    if not path.exists():
        return None
    start = Start.model_validate_json(path.read_text())
    return start if start.work == work and start.commit == commit() else None


def joined(found: Mapping[Kind, Sequence[Start]], targets: bool = True) -> Measured:
    """Medians of each kind, `first` apart: the start that found no caches. Until it is ready,
    forked takes no more than spawned, and eager no more than compiled; for a token the actor,
    compiled, takes at most 1.1 times bare vLLM, whose one process is all there is of it."""
    table: dict[str, float] = {}
    for kind, (first, *others) in found.items():
        name = "/".join(kind)
        own = "" if kind[0] == BARE else ENGINE
        table[f"{name}/first_cpu_s"] = of(first.ready_cpu_s, own)
        starts = others or [first]
        values = {
            "ready_s": [each.ready_s for each in starts],
            "ready_cpu_s": [of(each.ready_cpu_s, own) for each in starts],
            "ready_cpu_s/actor": [of(each.ready_cpu_s, "RolloutActor") for each in starts],
            "ready_cpu_s/all": [sum(each.ready_cpu_s.values()) for each in starts],
            "tokens": [each.tokens for each in (first, *others)],
            "cpu_s_a_thousand": [
                1e3 * sum(each.tokens_cpu_s.values()) / each.tokens for each in (first, *others)
            ],
            "ms_a_token": [1e3 * each.tokens_s / each.tokens for each in (first, *others)],
        }
        table |= {f"{name}/{what}": statistics.median(each) for what, each in values.items()}
    for mode in MODES:
        forked, spawned = (table[f"{start}/{mode}/ready_cpu_s"] for start in STARTS)
        table[f"{mode}/forked_over_spawned"] = forked / spawned
        for what in ("cpu_s_a_thousand", "ms_a_token"):
            ours, bare = (table[f"{start}/{mode}/{what}"] for start in (STARTS[0], BARE))
            table[f"{mode}/forked_over_bare/{what}"] = ours / bare
    for what in ("ready_cpu_s", "cpu_s_a_thousand"):
        eager, compiled = (table[f"forked/{mode}/{what}"] for mode in MODES)
        table[f"eager_over_compiled/{what}"] = eager / compiled
    limits = (
        Target("eager/forked_over_spawned", 1.0),
        Target("eager_over_compiled/ready_cpu_s", 1.0),
        *(
            Target(f"compiled/forked_over_bare/{what}", 1.1)
            for what in ("cpu_s_a_thousand", "ms_a_token")
        ),
    )
    loads = {"/".join(kind): [start.load for start in starts] for kind, starts in found.items()}
    return Measured(table, limits if targets else (), {"load": loads})


def of(seconds: Mapping[str, float], whose: str) -> float:
    """Those of all whose name begins so."""
    return sum(value for name, value in seconds.items() if name.startswith(whose))


def since(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """What each has used from one look to the next."""
    return {name: value - before.get(name, 0.0) for name, value in after.items()}


def begin(kind: Kind, work: Work, path: Path, fresh: bool) -> None:
    """Measure a start in a process of its own, which writes `path`."""
    home = FOLDER / "engine" / f"home-{'-'.join(kind)}"  # the same model, by its path, every time
    if fresh:
        shutil.rmtree(home, ignore_errors=True)
    if not home.exists():
        home.mkdir(parents=True)
        works.write(work, home)
    subprocess.run(
        [sys.executable, "-m", __name__, *kind, str(home), str(path)],
        input=work.model_dump_json(),
        text=True,
        cwd=REPOSITORY,
        env=environment(kind, home, os.environ),
        check=True,
        timeout=LIMIT_S,
    )


def environment(kind: Kind, home: Path, given: Mapping[str, str]) -> dict[str, str]:
    """The variables of a start: without forks where it is spawned, and with caches of its own."""
    apart = ("RAY_ADDRESS", "ALIGNTUNE_FORKS")
    kept = {name: value for name, value in given.items() if name not in apart}
    caches = {
        "VLLM_CACHE_ROOT": str(home / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(home / "inductor"),
    }
    return kept | caches | ({"ALIGNTUNE_FORKS": "off"} if kind[0] == "spawned" else {})


def began_as(parents: Sequence[int], actor: int) -> str:
    """How an engine's processes with these parents began: what the actor spawns is its child, what
    is forked for it is not. Raises RuntimeError where there is none."""
    if not parents:
        raise RuntimeError(f"no process whose title begins with {ENGINE}")
    return "spawned" if actor in parents else "forked"


def engines(process: psutil.Process) -> Iterator[int]:
    """The parents of vLLM's processes below `process`."""
    for each in process.children(recursive=True):
        try:
            if " ".join(each.cmdline()).startswith(ENGINE):
                yield each.ppid()
        except psutil.NoSuchProcess:
            continue


def about(kind: Kind, work: Work) -> dict[str, Any]:
    """Which start it is."""
    return {"start": kind[0], "mode": kind[1], "work": work, "commit": commit()}


def bare(kind: Kind, work: Work, home: Path) -> Start:
    """Bare vLLM in this process, as tests/bench/end_to_end/floor.py has it."""
    os.environ |= ALONE | {"OMP_NUM_THREADS": str(work.threads)}
    load, began, this = os.getloadavg()[0], time.monotonic(), psutil.Process()
    from vllm import LLM, SamplingParams

    from aligntune.quickstart.tiny import tiny_tokenizer

    llm = LLM(
        str(home / "model"),
        dtype="float32",
        max_model_len=work.longest,
        seed=work.seed,
        max_num_seqs=work.samples,
        kv_cache_memory_bytes=2**30,
        logprobs_mode="processed_logprobs",
        generation_config="vllm",
        skip_tokenizer_init=True,
        enforce_eager=kind[1] == "eager",
    )
    ready_s, ready = time.monotonic() - began, spent(this)
    tokenizer = tiny_tokenizer((), "", work.longest)
    prompts = [
        {"prompt_token_ids": tokenizer(text)["input_ids"]} for text in works.prompts_of(work)
    ]

    def tokens(of: Sequence[Mapping[str, object]], **sizes: int) -> int:
        params = SamplingParams(
            temperature=work.temperature,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            stop_token_ids=[tokenizer.eos_token_id],
            **sizes,
        )
        answers = llm.generate(list(of), params, use_tqdm=False)
        return sum(len(one.token_ids) for answer in answers for one in answer.outputs)

    tokens(prompts[:1], max_tokens=1)
    at, warm = time.monotonic(), spent(this)
    made = tokens(prompts, n=work.completions, max_tokens=work.new_tokens)
    return Start(
        **about(kind, work),
        load=load,
        ready_s=ready_s,
        ready_cpu_s=ready,
        tokens=made,
        tokens_s=time.monotonic() - at,
        tokens_cpu_s=since(warm, spent(this)),
    )


def life(kind: Kind, work: Work, home: Path) -> Start:
    """Start the engine in this process's Ray, and have it make the work's tokens.

    Raises RuntimeError where it did not begin as it should.
    """
    import ray

    from actors.disk import DISK_GROUP
    from actors.engines.specs import VLLMSpec
    from actors.liveness import HEALTH_GROUP
    from actors.messages import GroupSampling, Prompt
    from actors.rollout import RolloutActor
    from actors.specs import ModelSpec, RolloutSpec
    from aligntune.imports import MODELS, ROLES, VLLM, WORKERS, variables_of
    from aligntune.quickstart.tiny import tiny_tokenizer
    from cluster.session import session
    from cluster.specs import ClusterSpec

    began, load = kind[0], os.getloadavg()[0]
    tokenizer = tiny_tokenizer((), "", work.longest)
    prompts = [
        Prompt(row, text, text, np.asarray(tokenizer(text)["input_ids"], np.int32))
        for row, text in enumerate(works.prompts_of(work))
    ]
    spec = RolloutSpec(
        engine=VLLMSpec(compiles=kind[1] == "compiled"),
        max_prompt_length=work.prompt_tokens[1],
        max_completion_length=work.new_tokens,
        max_concurrent_groups=work.prompts,
    )
    sizes = {"max_tokens": work.new_tokens, "temperature": work.temperature}
    imports = MODELS + VLLM + WORKERS + ROLES
    this = psutil.Process()
    with session(ClusterSpec(), cpus=2, imports=imports):
        make = ray.remote(
            num_cpus=1,
            max_concurrency=2 * work.prompts,
            concurrency_groups=HEALTH_GROUP | DISK_GROUP,
            runtime_env={"env_vars": variables_of(work.threads, 0, by_itself=False)},
        )(RolloutActor)
        model = ModelSpec(name=str(home / "model"))
        actor = make.remote(model, spec, "rollout-0", 0, work.completions, work.seed)
        at = time.monotonic()
        pid = ray.get(actor.start.remote(), timeout=LIMIT_S)["pid"]
        ready_s, ready = time.monotonic() - at, spent(this)
        if (how := began_as(list(engines(this)), pid)) != began:
            raise RuntimeError(f"the engine was {how}, not {began}; Ray's raylet.err says why")

        def lengths(group: int, prompt: Prompt, **others: object) -> ray.ObjectRef:
            given = {**sizes, "completions": work.completions, **others}
            drawn = GroupSampling(seed=work.seed, group_id=group, **given)
            return actor.generate.options(num_returns=2).remote(prompt, drawn)[0]

        ray.get(lengths(len(prompts), prompts[0], completions=1, max_tokens=1), timeout=LIMIT_S)
        at, warm = time.monotonic(), spent(this)
        records = ray.get(list(map(lengths, range(len(prompts)), prompts)), timeout=LIMIT_S)
        tokens_s, used = time.monotonic() - at, since(warm, spent(this))
        ray.get(actor.close.remote(), timeout=60)
    return Start(
        **about(kind, work),
        load=load,
        ready_s=ready_s,
        ready_cpu_s=ready,
        tokens=sum(sum(record.lengths) for record in records),
        tokens_s=tokens_s,
        tokens_cpu_s=used,
    )


def main(arguments: Sequence[str]) -> None:
    """Measure one start and write it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("start", choices=(*STARTS, BARE))
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("home", type=Path)
    parser.add_argument("file", type=Path)
    asked = parser.parse_args(arguments)
    work = Work.model_validate_json(sys.stdin.read())
    measure_one = bare if asked.start == BARE else life
    made = measure_one((asked.start, asked.mode), work, asked.home)
    asked.file.write_text(made.model_dump_json(indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
