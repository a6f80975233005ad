"""The same loop on Ray actors with DeepSpeed learners: equal to the run in one process, and alive when its workers are killed."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from helpers import distance, rows, silent, weights
from safetensors.torch import load_file

import rlhub
from rlhub.algorithm.batching import make_batch
from rlhub.algorithm.compose import Algorithm
from rlhub.checkpoints.export import export
from rlhub.checkpoints.weights import load_network, save_network
from rlhub.config.schema import LearnerConfig, OptimizerConfig, Recipe
from rlhub.engines.torch_engine import Engine
from rlhub.errors import RecipeError, SyncError, UserError, WorkerLost
from rlhub.evals.checkpoint import evaluate_checkpoint
from rlhub.noise import Noise
from rlhub.parts import load_part
from rlhub.phases import Phase
from rlhub.records.metrics import read_metrics
from rlhub.records.rollout_log import read_rollouts, rollout_path
from rlhub.tasks import load_task, task_tokenizer
from rlhub.training.rollouts import issue
from rlhub.training.run import train
from rlhub.types import Batch, RewardResult
from workers.crew import Crew, gather
from workers.generator import Generator
from workers.learner import Learner
from workers.placement import assemble
from workers.runtimes.ray_runtime import RayHandle, RayRuntime
from workers.runtimes.runtime import Resources
from workers.sync import buckets_of, load_buckets, receipt_of
from workers.transports.gloo import Transport as Gloo
from workers.transports.object_store import Transport as ObjectStore

pytestmark = pytest.mark.usefixtures("quick_report")

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test file
ACTORS = ("run.runtime=ray", "learner.backend=deepspeed")
TEAM = (*ACTORS, "roles.generators=2", "roles.learners=2")


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """One cluster for all runs, so that each only starts its actors; it belongs to the user of the runs, which must not end it."""
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    ray.init(address="local", num_cpus=24, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def local_run(tiny: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny(f"run.output_dir={tmp_path_factory.mktemp('local')}"), silent())


@pytest.fixture(scope="module")
def ray_run(tiny: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny(f"run.output_dir={tmp_path_factory.mktemp('ray')}", *TEAM), silent())


def samples(run: Path, step: int) -> list[dict]:
    return [{key: value for key, value in sample.items() if key != "logp"} for sample in read_rollouts(rollout_path(run, step))]


def wait_for(condition: Callable[[], object], seconds: float = 120.0) -> object:
    until = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)
    return value


def process_of(run: Path, worker: str) -> int:
    """The process id that a worker wrote into its log when it started last."""
    return int(re.findall(r"starts as process (\d+)", (run / "logs" / f"{worker}.log").read_text())[-1])


def free_cpus() -> float:
    return ray.available_resources().get("CPU", 0.0)


# ------------------------------------------------------------------------------------------------------- equal to one process


def test_actors_generate_the_same_tokens(local_run: Path, ray_run: Path) -> None:
    for step in range(1, 5):
        assert samples(ray_run, step) == samples(local_run, step)


def test_actors_learn_the_same(local_run: Path, ray_run: Path) -> None:
    start, ours, theirs = weights(local_run, "sft_step_00004"), weights(ray_run), weights(local_run)
    assert distance(ours, theirs) <= 1e-3 * distance(theirs, start)
    first = load_file(local_run / "first_model" / "model.safetensors")
    assert distance(start, weights(ray_run, "sft_step_00004")) <= 1e-3 * distance(start, first)


def test_actors_measure_the_same(local_run: Path, ray_run: Path) -> None:
    for ours, theirs in zip(rows(ray_run), rows(local_run), strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert ours[key] == (pytest.approx(value, rel=1e-3, abs=1e-5) if isinstance(value, float) else value), key


def test_a_run_leaves_the_users_cluster_as_it_was(ray_run: Path) -> None:
    assert ray.is_initialized()
    wait_for(lambda: free_cpus() == 24)
    assert {path.stem for path in (ray_run / "logs").glob("*.log")} == {
        "learner-0",
        "learner-1",
        "generator-0",
        "generator-1",
        "scorer-0",
        "reward-0",
    }
    wait_for(lambda: not any(alive(process_of(ray_run, name)) for name in ("learner-0", "generator-1", "reward-0")))


def alive(process: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return False


def test_resume_under_ray_continues_identically(ray_run: Path, tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    killed = Path(shutil.copytree(ray_run, tmp_path / "tiny"))
    shutil.rmtree(killed / "checkpoints" / "step_00004")
    train(tiny(f"run.output_dir={tmp_path}", *TEAM), silent())
    assert rows(killed) == rows(ray_run)
    assert distance(weights(killed), weights(ray_run)) == 0.0


def test_eval_and_export_give_what_was_trained(ray_run: Path, tmp_path: Path) -> None:
    last = rows(ray_run)[-1]
    assert evaluate_checkpoint(ray_run) == {key: value for key, value in last.items() if key.startswith("eval/")}
    exported = load_network(export(ray_run, tmp_path / "exported"))
    trained = load_network(ray_run / "checkpoints" / "step_00004" / "hf")
    assert all(torch.equal(value, trained.state_dict()[name]) for name, value in exported.state_dict().items())
    tokens = torch.arange(8)[None]
    assert torch.equal(*(rlhub.load_model(path).logits(tokens) for path in (tmp_path / "exported", ray_run)))


# ------------------------------------------------------------------------------------------------------------- kill -9


def test_kill_9_of_a_generator_and_a_reward_worker_in_mid_step(tiny: Callable[..., Recipe], local_run: Path, tmp_path: Path) -> None:
    """A worker is frozen first, so that it surely has work in its hands when it is killed."""
    run = tmp_path / "tiny"
    overrides = ("roles.generators=2", "roles.reward_workers=2", "run.runtime=ray", "weights.transport=gloo", "reward_pool.batch_size=4")
    killed: list[int] = []

    def kill_in_mid_step() -> None:
        for worker, after in (("generator-1", ("sft", 4)), ("reward-0", ("online", 1))):
            wait_for(lambda after=after: after in [(row["phase"], row["step"]) for row in read_metrics(run / "metrics.jsonl")])
            process = process_of(run, worker)
            os.kill(process, signal.SIGSTOP)
            time.sleep(1.0)
            os.kill(process, signal.SIGKILL)
            killed.append(process)

    thread = threading.Thread(target=kill_in_mid_step, daemon=True)
    thread.start()
    console = silent()
    train(tiny(f"run.output_dir={tmp_path}", *overrides), console)
    thread.join(1)
    assert len(killed) == 2 and read_metrics(run / "metrics.jsonl")[-1]["system/workers_lost"] >= 2
    assert [row["num_samples"] for row in rows(run) if row["phase"] == "online" and row["step"] > 0] == [16] * 4
    assert rows(run) == rows(local_run), "same learner, so a run that lost workers ends as one that lost none, bit for bit"
    for step in range(1, 5):
        assert samples(run, step) == samples(local_run, step)
    assert distance(weights(run), weights(local_run)) == 0.0


@pytest.mark.slow
def test_a_frozen_generator_is_replaced(tiny: Callable[..., Recipe], local_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "tiny"

    def freeze() -> None:
        wait_for(lambda: ("online", 1) in [(row["phase"], row["step"]) for row in read_metrics(run / "metrics.jsonl")])
        os.kill(process_of(run, "generator-1"), signal.SIGSTOP)

    threading.Thread(target=freeze, daemon=True).start()
    limits = ("roles.generate_timeout_seconds=5", "weights.timeout_seconds=5")
    train(tiny(f"run.output_dir={tmp_path}", "roles.generators=2", "run.runtime=ray", *limits), silent())
    assert read_metrics(run / "metrics.jsonl")[-1]["system/workers_lost"] >= 1
    assert rows(run) == rows(local_run)


def test_the_death_of_a_learner_ends_the_run_with_its_log(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    run = tmp_path / "tiny"

    def kill() -> None:
        wait_for(lambda: len(read_metrics(run / "metrics.jsonl")) > 1)
        os.kill(process_of(run, "learner-1"), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    overrides = (*ACTORS, "roles.learners=2", "sft.steps=100000", "run.phases=[sft]", "sft.eval_every=100000", "roles.scorers=0")
    with pytest.raises(UserError, match=r"learner-1 died.*logs/learner-1\.log; the same command continues") as caught:
        train(tiny(f"run.output_dir={tmp_path}", "algorithm.kl.coefficient=0", *overrides), silent())
    assert "\n" not in str(caught.value)
    wait_for(lambda: free_cpus() == 24)
    wait_for(lambda: not alive(process_of(run, "learner-0")))


class Stumbling:
    """A worker whose every way to fail is tried."""

    def __init__(self, fails: bool = False) -> None:
        if fails:
            raise RecipeError("task.reward: no such file; give another")

    def work(self) -> None:
        raise RecipeError("row 3: bad")

    def items(self) -> Iterator[int]:
        yield 1
        raise RecipeError("row 4: bad")

    def vanish(self) -> None:
        os._exit(1)

    def double(self, value: int) -> int:
        return 2 * value


def test_errors_of_a_worker_arrive_as_themselves(tmp_path: Path) -> None:
    runtime = RayRuntime([Resources(0.1)] * 2, tmp_path)
    try:
        broken = runtime.spawn("broken", Stumbling, Resources(0.1), fails=True)
        sound = runtime.spawn("sound", Stumbling, Resources(0.1, restarts=-1))
        for attempt in (lambda: gather(runtime, [runtime.ping(broken)]), lambda: runtime.get(runtime.submit(broken, Stumbling.work))):
            with pytest.raises(RecipeError) as caught:
                attempt()
            assert str(caught.value) == "task.reward: no such file; give another"
        with pytest.raises(RecipeError, match=r"^row 3: bad$"):
            runtime.get(runtime.submit(sound, Stumbling.work))
        with pytest.raises(RecipeError, match=r"^row 4: bad$"):
            runtime.stream(sound, Stumbling.items)
        with pytest.raises(WorkerLost, match=rf"^sound died \(.*\); its log is {tmp_path}/sound\.log$"):
            runtime.get(runtime.submit(sound, Stumbling.vanish))
        assert wait_for(lambda: answers(runtime, sound))
        assert runtime.get(runtime.submit(sound, Stumbling.double, runtime.submit(sound, Stumbling.double, runtime.put(3)))) == 12
        busy = runtime.take_intervals()
        assert set(busy) == {"sound"} and len(busy["sound"]) == 2 and all(begin <= end for begin, end in busy["sound"])
        assert "row 3: bad" in (tmp_path / "sound.log").read_text() and "no such file" in (tmp_path / "broken.log").read_text()
    finally:
        runtime.close()


def answers(runtime: RayRuntime, handle: RayHandle) -> bool:
    try:
        return runtime.get(runtime.ping(handle)) > 0
    except WorkerLost:
        return False


def test_a_cluster_that_is_too_small_is_an_error_and_keeps_nothing() -> None:
    with pytest.raises(RecipeError, match=r"the roles ask for 99 CPUs and 0 GPUs, the cluster has 24 and 0; lower roles\.\* or add nodes"):
        RayRuntime([Resources(1)] * 99, reserve_timeout=1.0)
    wait_for(lambda: free_cpus() == 24)


# ------------------------------------------------------------------------------------------------------------- transports


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., Recipe]) -> Path:
    """A model folder with random weights."""
    recipe, tokenizer = tiny(), task_tokenizer("sort", {})
    family = load_part("models", "llada")
    vocabulary = {"vocab_size": len(tokenizer), "mask_token_id": tokenizer.mask_token_id, "eos_token_id": tokenizer.eos_token_id}
    network = family.build(family.Config.from_published({**recipe.model.config, **vocabulary, "pad_token_id": tokenizer.pad_token_id}))
    network.initialize(torch.Generator().manual_seed(0))
    path = tmp_path_factory.mktemp("model")
    save_network(network, path, tokenizer)
    return path


@pytest.fixture(scope="module")
def crew(tiny: Callable[..., Recipe], model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crew]:
    """One learner and two generators; small buckets, so that there are several."""
    recipe = tiny("run.runtime=ray", "roles.generators=2", "roles.scorers=0", "algorithm.kl.coefficient=0", "weights.bucket_megabytes=0.02")
    recipe.run.output_dir = str(tmp_path_factory.mktemp("crew"))
    crew = assemble(recipe, model, Path(recipe.run.output_dir))
    crew.recipe = recipe
    crew.learners.begin(recipe.algorithm, recipe.learner.optimizer, 8)
    yield crew
    crew.close()


def generate(crew: Crew, version: int) -> list[list[int]]:
    """Tokens of 8 requests, half by each generator if both are there."""
    requests = some_requests()
    pieces = [(requests[:4], crew.recipe.sampler, version), (requests[4:], crew.recipe.sampler, version)]
    return [rollout.completion_ids.tolist() for part in crew.generators.map(Generator.generate, pieces) for rollout in part]


def some_requests() -> list:
    return issue(load_task("sort", {"digits": 4}, "train", 0), task_tokenizer("sort", {}), Phase.ONLINE, 1, 0, 4, 2).requests


def expected(crew: Crew, model: Path) -> list[list[int]]:
    """The same by the learner's weights in this process."""
    network = load_network(model)
    load_buckets(network.state_dict(), learner_buckets(crew), crew.bucket_bytes)
    rollouts = Engine(network).generate(some_requests(), crew.recipe.sampler, Noise(0))
    return [rollout.completion_ids.tolist() for rollout in rollouts]


def learner_buckets(crew: Crew) -> list[np.ndarray]:
    return [crew.runtime.get(future) for future in crew.runtime.stream(crew.learners.handles[0], Learner.publish, crew.bucket_bytes)]


def learn_something(crew: Crew) -> None:
    crew.learners.step(Algorithm.compose(crew.recipe.algorithm).credited(batch_of(16)))


def batch_of(size: int) -> Batch:
    """Graded rollouts of random weights, ragged in their rewards."""
    issued = issue(load_task("sort", {"digits": 4}, "train", 0), task_tokenizer("sort", {}), Phase.ONLINE, 1, 0, size // 4, 4)
    rng = np.random.default_rng(0)
    rollouts = [
        fake_rollout(request, rng.integers(0, 10, 4)).graded(RewardResult(float(rng.integers(0, 3)))) for request in issued.requests
    ]
    return make_batch(rollouts, scored_length="canvas", block_length=4)


def fake_rollout(request: object, completion: np.ndarray) -> object:
    steps, logp = np.arange(4, dtype=np.int16), np.zeros(4, np.float32)
    fields = (completion.astype(np.int32), 4, steps, logp, logp, np.zeros(4, np.int32), 4)
    return rlhub.types.Rollout(request.uid, request.group_uid, request.prompt_ids, *fields)


@pytest.mark.parametrize("transport", [ObjectStore, Gloo])
def test_both_transports_deliver_every_bit(crew: Crew, model: Path, transport: type) -> None:
    crew.transport = transport(crew.runtime, crew.learners.handles, crew.recipe.weights)
    learn_something(crew)
    published = crew.publish(100)
    assert len(published.bucket_hashes) > 3 and published.version == 100
    network = load_network(model)
    load_buckets(network.state_dict(), learner_buckets(crew), crew.bucket_bytes)
    assert published == receipt_of(network, 100, crew.bucket_bytes)
    assert generate(crew, 100) == expected(crew, model)
    with pytest.raises(SyncError):
        crew._check("generator-0", receipt_of(load_network(model), 100, crew.bucket_bytes))  # the weights before they learned


class Tampering(ObjectStore):
    """One flipped bit on the way."""

    def publish(self) -> None:
        super().publish()
        bucket = self.runtime.get(self.buckets[1]).copy()
        bucket[5] ^= 1
        self.buckets[1] = self.runtime.put(bucket)


def test_a_flipped_bit_on_the_way_is_detected(crew: Crew) -> None:
    crew.transport = Tampering(crew.runtime, crew.learners.handles, crew.recipe.weights)
    with pytest.raises(SyncError, match=r"generator-\d holds other weights than the learners: bucket_hashes"):
        crew.publish(200)


def test_buckets_of_another_model_are_refused(model: Path) -> None:
    network = load_network(model)
    buckets = list(buckets_of(network.state_dict(), 20_000))
    with pytest.raises(SyncError, match=r"received \d+ buckets, expected \d+"):
        load_buckets(network.state_dict(), buckets[:-1], 20_000)
    with pytest.raises(SyncError, match=r"has \d+ bytes, expected \d+"):
        load_buckets(network.state_dict(), [*buckets[:-1], buckets[-1][:-4]], 20_000)


def test_gloo_survives_a_generator_that_dies_in_the_broadcast(crew: Crew, model: Path) -> None:
    gloo = crew.transport = Gloo(crew.runtime, crew.learners.handles, crew.recipe.weights)
    crew.publish(300)
    assert gloo.generation == 1 and set(gloo.members) == {"generator-0", "generator-1"}
    victim = gloo.members["generator-1"]
    learn_something(crew)
    os.kill(victim, signal.SIGSTOP)
    # The ping that every push begins with would wait for a frozen process, so it is frozen for the time of the broadcast only.
    threading.Timer(1.0, os.kill, (victim, signal.SIGKILL)).start()
    crew.publish(301)
    assert generate(crew, 301) == expected(crew, model), "both serve again: the survivor, and the late joiner by the object store"
    wait_for(lambda: all(answers(crew.runtime, handle) for handle in crew.generators.handles))
    learn_something(crew)
    crew.publish(302)
    assert gloo.generation >= 2 and set(gloo.members) == {"generator-0", "generator-1"} and gloo.members["generator-1"] != victim
    assert generate(crew, 302) == expected(crew, model)


# ------------------------------------------------------------------------------------------------------------- DeepSpeed


class Summing:
    """A backend that only collects gradients and averages them over the ranks, as DeepSpeed does."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.network = network

    def forward(self, function: Callable) -> torch.Tensor:
        return function(self.network)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def gradient(self) -> torch.Tensor:
        flat = torch.cat([parameter.grad.flatten() for parameter in self.network.parameters()])
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(flat)
            flat /= torch.distributed.get_world_size()
        return flat


class Probe(Learner):
    """A learner that shows the gradient of its first update."""

    def gradient(self, batch: Batch, micro_batch_tokens: int) -> torch.Tensor:
        self.backend, self.config.micro_batch_tokens = Summing(self.network), micro_batch_tokens
        self.network.zero_grad()
        credited = self.algorithm.credited(batch)
        self._update(credited, self.make_views(credited)[0], None, None)
        return self.backend.gradient()


@pytest.fixture(scope="module")
def spawn_learners(model: Path, tiny: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable]:
    """`spawn_learners(count, stage)`: DeepSpeed learners of one group, ready for their first step."""
    runtimes: list[RayRuntime] = []

    def spawn(count: int, stage: int) -> tuple[RayRuntime, list[RayHandle]]:
        runtime = RayRuntime([Resources(1)] * count, tmp_path_factory.mktemp(f"zero{stage}"))
        runtimes.append(runtime)
        config = LearnerConfig(backend="deepspeed", zero_stage=stage, micro_batch_tokens=128)
        learners = [
            runtime.spawn(
                f"learner-{rank}",
                Probe,
                Resources(1),
                model_path=str(model),
                config=config,
                run_seed=0,
                rank=rank,
                num_learners=count,
                threads=1,
            )
            for rank in range(count)
        ]
        address = runtime.get(runtime.submit(learners[0], Probe.rendezvous))
        everyone(runtime, learners, Probe.join, address)
        begin(runtime, learners, tiny(), model)
        return runtime, learners

    yield spawn
    for runtime in runtimes:
        runtime.close()


def everyone(runtime: RayRuntime, learners: list[RayHandle], method: Callable, *args: object) -> list:
    return gather(runtime, [runtime.submit(learner, method, *args) for learner in learners])


def begin(runtime: RayRuntime, learners: list[RayHandle], recipe: Recipe, model: Path) -> None:
    everyone(runtime, learners, Probe.begin, free_of_reference(recipe), OPTIMIZER, 8, str(model))


def free_of_reference(recipe: Recipe):
    recipe.algorithm.kl.coefficient = 0.0
    return recipe.algorithm


OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_steps=0)


def weights_of(runtime: RayRuntime, learners: list[RayHandle], model: Path) -> dict[str, torch.Tensor]:
    store = ObjectStore(runtime, learners, rlhub.config.schema.SyncConfig())
    store.publish()
    network = load_network(model)
    load_buckets(network.state_dict(), [runtime.get(bucket) for bucket in store.buckets], store.bucket_bytes)
    return network.state_dict()


@pytest.fixture(scope="module")
def reference_learner(model: Path, tiny: Callable[..., Recipe]) -> Learner:
    """The torch backend in this process after two steps on the same batch."""
    learner = Learner(str(model), LearnerConfig(backend="torch", micro_batch_tokens=128), 0)
    learner.begin(free_of_reference(tiny()), OPTIMIZER, 8)
    for _ in range(2):
        learner.step(learner.algorithm.credited(batch_of(16)))
    return learner


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_stages_step_save_and_load(
    spawn_learners: Callable, reference_learner: Learner, tiny: Callable[..., Recipe], model: Path, tmp_path: Path, stage: int
) -> None:
    runtime, learners = spawn_learners(2, stage)
    batch = Algorithm.compose(free_of_reference(tiny())).credited(batch_of(16))
    metrics, _ = everyone(runtime, learners, Probe.step, batch)
    (tmp_path / "saved").mkdir()
    everyone(runtime, learners, Probe.save, str(tmp_path / "saved"))
    everyone(runtime, learners, Probe.step, batch)
    after = weights_of(runtime, learners, model)
    start, target = load_network(model).state_dict(), reference_learner.network.state_dict()
    assert metrics["grad_norm"] > 0
    assert distance(after, target) <= 1e-3 * distance(target, start)

    everyone(runtime, learners, Probe.step, batch)  # somewhere else
    begin(runtime, learners, tiny(), model)
    everyone(runtime, learners, Probe.load, str(tmp_path / "saved"))
    saved = load_file(tmp_path / "saved" / "hf" / "model.safetensors")
    assert distance(weights_of(runtime, learners, model), saved) == 0.0
    everyone(runtime, learners, Probe.step, batch)
    assert distance(weights_of(runtime, learners, model), after) == 0.0
    receipts = everyone(runtime, learners, Probe.receipt, 1, 2**20)
    assert receipts[0] == receipts[1]
    runtime.close()


def test_two_learners_have_the_gradient_of_one(spawn_learners: Callable, tiny: Callable[..., Recipe], model: Path) -> None:
    one = Probe(str(model), LearnerConfig(backend="torch"), 0)
    one.begin(free_of_reference(tiny()), OPTIMIZER, 8)
    whole = one.gradient(batch_of(20), 4096)
    runtime, learners = spawn_learners(2, 1)
    for tokens in (64, 4096):  # two passes with unequal numbers of micro-batches, and one pass
        halves = everyone(runtime, learners, Probe.gradient, batch_of(20), tokens)
        assert torch.equal(*halves)
        assert float((halves[0].double() - whole.double()).norm() / whole.double().norm()) <= 1e-6


# ------------------------------------------------------------------------------------------------------------- command line


@pytest.mark.slow
def test_ctrl_c_stops_with_a_checkpoint_and_the_same_command_finishes(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {"HOME": str(home)}
    grader = f"task.reward.name={tiny.folder}/graders.py:ascending"
    options = (*ACTORS, "run.phases=[online]", "run.steps=6", "run.checkpoint_every=100", f"run.output_dir={tmp_path}", grader)
    command = [sys.executable, "-m", "rlhub", "train", str(tiny.folder / "tiny.yaml"), *options]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=tmp_path
    )
    run = tmp_path / "tiny"
    wait_for(lambda: len(read_metrics(run / "metrics.jsonl")) >= 2 or process.poll() is not None, 240)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does: everybody in the group gets it
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "stopping after this step with a checkpoint" in output
    assert errors.strip().startswith("stopped; the same command continues from the last checkpoint: rlhub train") and grader in errors
    done = read_metrics(run / "metrics.jsonl")[-1]["step"]
    assert 1 <= done < 6 and [path.name for path in (run / "checkpoints").iterdir()] == [f"step_{done:05d}"]
    assert not any(alive(process_of(run, path.stem)) for path in (run / "logs").glob("*.log"))

    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert f"resuming after step {done} of phase online" in finished.stdout and finished.stderr == ""
    assert [row["step"] for row in rows(run)] == list(range(7))
    assert not (home / ".ray").exists(), "a cluster of our own leaves no token behind"
