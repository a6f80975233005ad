"""`train`: open the run folder, assemble the crew, run the phases, report."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from rlhub.checkpoints.adapters import rebase_adapter, write_fresh_adapter
from rlhub.checkpoints.folders import empty_network, family_of, is_adapter_folder, is_model_folder, published_config, published_form
from rlhub.checkpoints.sealed import resolve_model_path, sealed_checkpoints
from rlhub.checkpoints.tokenizers import load_tokenizer
from rlhub.checkpoints.weights import save_network
from rlhub.config.checks import check_devices
from rlhub.config.recipe import dump_recipe, load_recipe, validate
from rlhub.config.schema import Recipe, RopeConfig
from rlhub.config.tasks import check_reward_columns, evaluation_task, task_kind
from rlhub.errors import CheckpointError, RecipeError, UserError, WorkerLost
from rlhub.files import replace_file
from rlhub.networks.rope import extend
from rlhub.noise import Noise
from rlhub.parts import load_part, own_part_hashes
from rlhub.phases import Phase
from rlhub.planning.plan import make_plan
from rlhub.planning.view import format_plan
from rlhub.records.metrics import read_metrics, summarize
from rlhub.records.progress import RunProgress, summary_panel
from rlhub.records.trackers import Trackers
from rlhub.reports.page import write_report
from rlhub.tasks import Task, load_task, task_tokenizer
from rlhub.training import controller
from rlhub.training.grade_checks import try_grader
from rlhub.training.held_out import shared_prompts
from rlhub.training.pairs import PairData, load_pairs, report_bad
from rlhub.training.session import Session, StopRequest, last_position

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LOOPS = {Phase.SFT: controller.run_sft, Phase.ONLINE: controller.run_online, Phase.PAIRS: controller.run_pairs}
# Between attempts of one run. Its name is that of its folder, which may have been moved.
MAY_CHANGE = ("run.name", "run.output_dir", "run.resume", "run.keep_checkpoints", "run.trackers", "run.dashboard", "about")


def train(recipe: Recipe, console: Console | None = None) -> Path:
    """Run a recipe to its end, from its last checkpoint when the folder exists; returns the run folder.

    Raises:
        RecipeError: the recipe cannot run here, or the folder holds another recipe's run.
        CheckpointError: the checkpoint to resume from is corrupt.
        UserError: a worker that cannot be replaced died; the message names its log.
    """
    try:
        return _train(recipe, console)
    except WorkerLost as error:
        raise UserError(f"{error}; the same command continues from the last checkpoint") from error


def _train(recipe: Recipe, console: Console | None) -> Path:
    """`train`, in which a lost worker is not yet the user's affair."""
    validate(recipe)
    check_devices(recipe)
    console = console or Console()
    folder = Path(recipe.run.output_dir).resolve() / recipe.run.name
    resumed = _open_folder(recipe, folder)
    position, wall_before = last_position(folder) if resumed else (None, 0.0)
    _say_where(folder, console)
    phases = [Phase(name) for name in recipe.run.phases]
    last = (phases[-1], recipe.sft.steps if phases[-1] == Phase.SFT else recipe.run.steps)
    if position is not None and position == last:
        console.print(f"this run is finished (phase {position[0]}, step {position[1]}); nothing to do", markup=False)
        _finish(folder, console)
        return folder

    started = time.time()
    train_task, eval_task = _tasks(recipe)
    model_path = _first_model(recipe, folder)
    tokenizer = load_tokenizer(str(model_path))
    context = _context(model_path, tokenizer)
    if recipe.task.reward["name"] != "none":
        _check_held_out(train_task, eval_task, console)
        _check_lengths(recipe, context, tokenizer, [train_task, eval_task])
    pairs = _preferences(recipe, folder, tokenizer, context, console)

    from workers.placement import assemble

    if position is not None:
        console.print(f"resuming after step {position[1]} of phase {position[0]}", markup=False, highlight=False)
    console.print("starting the workers", markup=False)
    crew = assemble(recipe, model_path, folder / "logs")
    try:
        with Trackers(folder, recipe.run.trackers) as trackers, RunProgress(console) as progress, StopRequest(progress) as stop:
            if resumed:
                phase, step = position or (phases[0], -1)
                trackers.truncate_after(phase, step, phases)
            session = Session(
                recipe=recipe,
                folder=folder,
                model_path=model_path,
                tokenizer=tokenizer,
                train_task=train_task,
                eval_task=eval_task,
                crew=crew,
                trackers=trackers,
                progress=progress,
                position=position,
                stop=stop,
                wall_before=wall_before,
                pairs=pairs,
            )
            session.started = started
            try_grader(crew, recipe, train_task)
            for phase in phases[phases.index(position[0]) if position else 0 :]:
                LOOPS[phase](session)
    finally:
        crew.close()
    _finish(folder, console)
    return folder


def _tasks(recipe: Recipe) -> tuple[Task, Task]:
    """Both splits of a recipe's task, with the columns that its reward needs."""
    train_task, eval_task = load_task(recipe.task.name, recipe.task.train, "train", recipe.run.seed), evaluation_task(recipe)
    for task in (train_task, eval_task):
        check_reward_columns(recipe, task)
    return train_task, eval_task


def _say_where(folder: Path, console: Console) -> None:
    console.print(f"run folder {folder}", markup=False, highlight=False, soft_wrap=True)
    if "working_dir_files" in folder.parts:
        console.print(
            "it lies in the copy that Ray made for this job and will delete; set run.output_dir to a folder that stays", markup=False
        )


def _preferences(recipe: Recipe, folder: Path, tokenizer: PreTrainedTokenizerFast, context: int, console: Console) -> PairData | None:
    """The preference data of a recipe that has some; what cannot be used is told and listed in the run folder."""
    if Phase.PAIRS not in recipe.run.phases and task_kind(recipe) != "preferences":
        return None
    pairs = load_pairs(recipe, tokenizer, context)
    bad = report_bad(pairs, folder / "bad_pairs.jsonl")
    if bad is not None:
        console.print(bad, markup=False, highlight=False, soft_wrap=True)
    return pairs


def _finish(folder: Path, console: Console) -> None:
    report = write_report([folder])
    summary = summarize(read_metrics(folder / "metrics.jsonl"))
    if summary is not None:
        console.print(summary_panel(summary, folder))
    console.print(f"report {report}", markup=False, highlight=False, soft_wrap=True)


def _open_folder(recipe: Recipe, folder: Path) -> bool:
    """Make the run folder, or check that it holds a run of this recipe; whether it does.

    A folder in which nothing was trained yet, as after a start that failed, is made anew.
    """
    saved = folder / "config.yaml"
    if saved.exists() and (sealed_checkpoints(folder) or read_metrics(folder / "metrics.jsonl")):
        if not recipe.run.resume:
            raise RecipeError(f"{folder} holds a run already and run.resume is false; choose another run.name, nothing was overwritten")
        before, now = (_flat(value) for value in (load_recipe(saved), recipe))
        for key in sorted({*before, *now}):
            if before.get(key) != now.get(key) and key not in MAY_CHANGE:
                raise RecipeError(
                    f"{folder} holds a run with {key}={before.get(key)!r}, the recipe says {now.get(key)!r}; "
                    "choose another run.name, nothing was overwritten"
                )
        _check_own_parts(recipe, folder)
        return True
    if folder.exists() and not saved.exists() and any(not file.name.startswith(".") for file in folder.iterdir()):
        raise RecipeError(f"{folder} is not empty and holds no run; choose another run.name, nothing was overwritten")
    plan = make_plan(recipe)
    # The recipe comes first: a start that is killed from here on leaves a folder that the next one recognises.
    replace_file(saved, dump_recipe(recipe))
    replace_file(folder / "parts.json", json.dumps(own_part_hashes(_flat(recipe)), indent=2) + "\n")
    (folder / "logs").mkdir(exist_ok=True)
    replace_file(folder / "plan.txt", format_plan(plan) + "\n")
    replace_file(folder / "plan.json", json.dumps(plan.to_dict(), indent=2) + "\n")
    for name in ("first_model", "first_adapter"):
        shutil.rmtree(folder / name, ignore_errors=True)
    return False


def _check_own_parts(recipe: Recipe, folder: Path) -> None:
    """Refuse to go on with parts of the user's own that are not those that the run began with."""
    kept = folder / "parts.json"
    before = json.loads(kept.read_text()) if kept.exists() else {}
    now = own_part_hashes(_flat(recipe))
    for file, digest in before.items():
        if now.get(file) != digest:
            raise RecipeError(
                f"{file} {'is not what it was' if file in now else 'is gone'} since this run began, so its numbers would not be one run's; "
                "bring it back or choose another run.name, nothing was overwritten"
            )


def _flat(recipe: Recipe) -> dict[str, Any]:
    def walk(value: Any, prefix: str) -> dict[str, Any]:
        if isinstance(value, dict) and value:
            return {key: leaf for name, item in value.items() for key, leaf in walk(item, f"{prefix}{name}.").items()}
        return {prefix.rstrip("."): list(value) if isinstance(value, tuple) else value}

    return walk(dataclasses.asdict(recipe), "")


def _first_model(recipe: Recipe, folder: Path) -> Path:
    """The model folder that the run starts from; with adapters, that of the first one, which names its base."""
    base, path, model = _first_base(recipe, folder), folder / "first_adapter", recipe.model
    if model.adapter is None and model.lora.rank == 0:
        return base
    if is_model_folder(path):
        return path
    tokenizer = load_tokenizer(str(base))
    if model.adapter is not None:
        adapter = resolve_model_path(Path(model.adapter).resolve())
        if not is_adapter_folder(adapter):
            raise RecipeError(f"model.adapter: {adapter} holds no adapter_config.json; give an adapter's folder, or model.path alone")
        rebase_adapter(adapter, base, path, tokenizer)
    else:
        seed = int(Noise(recipe.run.seed).generator("adapter").integers(2**62))
        lora, generator = model.lora, torch.Generator().manual_seed(seed)
        write_fresh_adapter(base, path, lora.rank, lora.alpha, lora.targets, generator, tokenizer)
    return path


def _first_base(recipe: Recipe, folder: Path) -> Path:
    """The model that the recipe names, or a random one with the task's tokenizer when it names none."""
    path, rope = folder / "first_model", recipe.model.rope
    if recipe.model.path is not None and rope.scaling == "none":
        return resolve_model_path(Path(recipe.model.path).resolve())
    if is_model_folder(path):
        return path
    if recipe.model.path is not None:
        _extend_context(resolve_model_path(Path(recipe.model.path).resolve()), path, rope)
        return path
    tokenizer = task_tokenizer(recipe.task.name, recipe.task.train)
    if tokenizer is None:
        raise RecipeError(f"task {recipe.task.name} brings no tokenizer, so the recipe must name a checkpoint: model.path=FOLDER")
    family = load_part("models", recipe.model.family)
    vocabulary = {
        "vocab_size": len(tokenizer),
        "mask_token_id": tokenizer.mask_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    network = family.build(extend(family.Config.from_published({**recipe.model.config, **vocabulary}), rope))
    seed = int(Noise(recipe.run.seed).generator("initialize").integers(2**62))
    network.initialize(torch.Generator().manual_seed(seed))
    save_network(network, path, tokenizer)
    return path


def _extend_context(base: Path, path: Path, rope: RopeConfig) -> None:
    """Make `path` the same model with another rotary base and context in its config.json, and links to all else."""
    if is_adapter_folder(base):
        raise RecipeError(f"model.rope: {base} is an adapter, whose base keeps its context; export it with rlhub export, then use that")
    published = published_config(base)
    config = published_form(extend(family_of(published).Config.from_published(published), rope))
    path.mkdir(parents=True, exist_ok=True)
    for file in base.iterdir():
        if file.is_file() and file.name != "config.json" and not (path / file.name).is_symlink():
            (path / file.name).symlink_to(file.resolve())
    replace_file(path / "config.json", json.dumps(published | config, indent=2) + "\n")


def _context(model_path: Path, tokenizer: PreTrainedTokenizerFast) -> int:
    """The longest row of tokens that the model takes, after checking that it can mask."""
    if tokenizer.mask_token_id is None:
        raise CheckpointError(f"the tokenizer in {model_path} has no mask token; set mask_token in tokenizer_config.json")
    return empty_network(published_config(model_path), str(model_path)).max_length


def _check_held_out(train_task: Task, eval_task: Task, console: Console) -> None:
    shared = shared_prompts(train_task, eval_task)
    if shared and shared == eval_task.size:
        raise RecipeError(f"all {shared} test prompts are training prompts too; give held-out rows of their own, such as task.eval.path")
    if shared:
        console.print(f"{shared} of {eval_task.size} test prompts occur in the training data, so accuracy flatters", markup=False)


def _check_lengths(recipe: Recipe, context: int, tokenizer: PreTrainedTokenizerFast, tasks: list[Task]) -> None:
    """Refuse prompts that do not fit the context before anything starts, on the first examples of each split."""
    from rlhub.checkpoints.tokenizers import encode_prompts

    for task in tasks:
        count = 256 if task.size is None else min(task.size, 1024)
        examples = [task.example(index) for index in range(count)]
        for example, ids in zip(examples, encode_prompts(tokenizer, [example.prompt for example in examples]), strict=True):
            if len(ids) + recipe.sampler.length > context:
                raise RecipeError(
                    f"the {task.split} prompt of row {example.row} has {len(ids)} tokens; with sampler.length={recipe.sampler.length} it "
                    f"exceeds the model's context of {context}; shorten the prompts or sampler.length"
                )
