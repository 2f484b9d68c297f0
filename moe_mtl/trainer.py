"""Training: losses -> balancer -> regularizers -> step -> checkpoint, and nothing else.

    Trainer(model, data, TrainerConfig(out="runs/mine", steps=1000)).fit()

The folder `out` then holds

    config.json, model.safetensors     the trained model, as `moe_mtl.load(out)` reads it (of `create_model`'s models)
    run.json                           the whole configuration; `train.py --config` takes it
    metrics.jsonl                      one JSON per logged step and per evaluation
    tensorboard/                       the same as curves
    checkpoints/step_<n>/              the newest `keep`; a killed run goes on from the last one when started again

A resumed run repeats the numbers of an unbroken one bit for bit on the same machine with the same number of threads,
when `num_workers` is 0.
"""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader

from moe_mtl import checkpoint as checkpoints
from moe_mtl import hub, regularizers
from moe_mtl.as_trained import check_columns, check_labels, fingerprint
from moe_mtl.balancing import create_balancer
from moe_mtl.batches import in_order, one_task_each, training_order
from moe_mtl.data import collate, load_tokenizer
from moe_mtl.early_stopping import EarlyStopping
from moe_mtl.gates import Gate
from moe_mtl.images import learn_colours
from moe_mtl.multitask import SingleTaskSet, count_rows, task_ids
from moe_mtl.parameter_groups import frozen_statistics, names_in_order, parameter_groups
from moe_mtl.run_folder import CHECKPOINTS, INSTEAD, RUN, last_checkpoint
from moe_mtl.run_log import RunLog
from moe_mtl.scoring import TaskMetrics
from moe_mtl.tasks import Task
from moe_mtl.trainer_config import TrainerConfig, lr_factor
from moe_mtl.two_step import two_step_losses
from moe_mtl.validation import validate

Batch = dict[str, Any]
Scalars = dict[str, float]


class TrainingDiverged(RuntimeError):
    """A loss or the gradient is NaN or infinite; the message names the task and the step."""


class Trainer:
    """Trains one model on one data set.

    Args:
        model: predicts `model.tasks`; called as `model(x, tasks=names, return_routing=True)`, where x is the entry of
            the batch that `model.input` names, "image" where it names none. A model with a method
            `auxiliary_losses(predictions)` has these, {name: scalar}, added to its loss.
        data: has `task_list()`, and `split("train")` and `split("val")`, map-style data sets of samples; see
            `moe_mtl.data`.
        config: how.
        tasks: names of the tasks to train and to score; all that the model predicts when None. The data need not know
            the others.
        run: JSON-ready description of model and data, to refuse going on with different ones; `train.py` gives the
            whole recipe.

    Raises:
        ValueError: the configuration names something unknown or does not fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        config: TrainerConfig,
        run: Mapping[str, Any] | None = None,
        *,
        tasks: Sequence[str] | None = None,
    ):
        self.config, self.data, self.model = config, data, model
        self.tasks: tuple[Task, ...] = tuple(model.tasks)  # type: ignore[arg-type]
        self.input: str = getattr(model, "input", "image")
        ids = range(len(self.tasks)) if tasks is None else sorted(task_ids(self.tasks, tasks))
        self.trained = tuple(self.tasks[i] for i in ids)
        names = [task.name for task in self.trained]
        if config.tasks_per_step is not None and config.tasks_per_step > len(names):
            raise ValueError(f"tasks_per_step: got {config.tasks_per_step}, the model has {len(names)} tasks: {names}")
        if lacking := sorted(set(names) - {task.name for task in data.task_list()}):
            raise ValueError(f"data: has no task {', '.join(lacking)}, which the model predicts")
        check_columns(model, data)
        check_labels(self.trained, data)
        self.table = fingerprint(data)
        regularizers.check(config.regularizers, config.regularizer_args)
        TaskMetrics(self.trained)  # refuses a metric that does not fit its task now, not at the first evaluation
        how = dataclasses.asdict(config)
        for name in ("resume", "overwrite"):  # orders for one start; a file of a run must not repeat them
            del how[name]
        self.run = json.loads(json.dumps({**(run or {}), "trainer": how}, default=str))
        self.out = None if config.out is None else Path(config.out)

        # mixed_precision is a setting of the process in accelerate; ours belongs to the run
        self.accelerator = Accelerator(cpu=config.device == "cpu", mixed_precision="no")
        if self.accelerator.num_processes > 1:
            raise ValueError(
                f"num_processes: got {self.accelerator.num_processes}, but every process would train on the same "
                "batches; start one"
            )
        self.device = self.accelerator.device
        bf16_pays = self.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        self.bf16 = config.precision == "bf16" or (config.precision == "auto" and bf16_pays)

        self.parallel = self.accelerator.prepare_model(model)
        self.balancer = create_balancer(config.balancer, self.tasks, **config.balancer_args).to(self.device)
        if config.accumulate > 1 and not self.balancer.affine:
            raise ValueError(f"accumulate: the balancer {config.balancer!r} needs the whole batch at once; use 1")
        groups = parameter_groups(model, config)
        own = list(self.balancer.parameters())
        groups += [{"params": own, "weight_decay": 0.0, "scale": self.balancer.lr_scale}] if own else []
        # one pass over the weights: on a CPU a sixth of the time for an encoder's 22 million
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)

        self.early = None if config.patience is None else EarlyStopping(model, config.patience)
        self.still = frozen_statistics(model)
        self.step = 0
        self.seconds = 0.0  # of training, without evaluation and checkpoints, over all restarts
        self.task_sampler = torch.Generator().manual_seed(config.seed)
        self.window: dict[str, list[float]] = {}  # per quantity its sum and count since the last record

    def fit(self, on_step: Callable[[int, Scalars], None] | None = None) -> nn.Module:
        """Trains to the end, or as long as patience lasts, from the last checkpoint if there is one.

        The model, if it is one of `create_model`, is saved in `out`, with the tokenizer where the data set names one.

        Args:
            on_step: called after each update and its checkpoint with the number of updates done and the losses.

        Returns:
            The model that was passed in, trained, in evaluation mode.

        Raises:
            TrainingDiverged: a loss or the gradient is not finite. Checkpoints stay.
            ValueError: `out` holds a finished or different run, or a checkpoint that does not fit; or another process
                is training into it.
            OSError: a checkpoint could not be written, on a full disk, say. Those before it stay.
        """
        with nullcontext() if self.out is None else checkpoints.held(self.out):
            return self._fit(on_step)

    def _fit(self, on_step: Callable[[int, Scalars], None] | None) -> nn.Module:
        config = self.config
        train = self.data.split("train")
        val = self.data.split("val") if config.eval_every else None
        random_state = None if self.out is None else self._open_run(self.out)
        order = training_order(train, config, [task.name for task in self.trained], self.step)
        loader, first = iter(self._loader(train, batch_sampler=order)), True
        if random_state is None:
            set_seed(config.seed)
        else:  # last, so that nothing above has drawn from them
            checkpoints.set_random_state(random_state)

        with RunLog(self.out, step=self.step, steps=config.steps, progress=config.progress) as log:
            while self.step < config.steps and not (self.early and self.early.over):
                began = time.perf_counter()
                batch = next(loader)
                if first and self.input == "image":
                    whole = len(self.trained) == len(self.tasks)
                    if told := learn_colours(self.model, batch[self.input], whole=whole):
                        print(told, file=sys.stderr)
                first = False
                losses = self._update(batch)
                self.step += 1
                self.seconds += time.perf_counter() - began
                last = self.step == config.steps
                if self.step % config.log_every == 0 or last:
                    log.record(self.step, "train", self._summary())
                if val is not None and (self.step % config.eval_every == 0 or last):
                    found = self.evaluate(val)
                    log.record(self.step, "val", found)
                    if self.early is not None:
                        self.early.update(self.step, found["loss"].values())
                        last = last or self.early.over
                if self.out is not None and (self.step % config.save_every == 0 or last):
                    log.flush()  # a checkpoint never knows more than the log
                    if last:
                        self._save_model(self.out)  # first: the last checkpoint marks the run as finished
                    self._save(self.out)
                if on_step is not None:
                    on_step(self.step, losses)
        if self.early is not None:
            self.early.restore()
        return self.model.eval()

    def _save_model(self, out: Path) -> None:
        named = getattr(self.data, "tokenizer", None) if self.input == "text" else None
        with nullcontext() if self.early is None else self.early.restored():
            try:
                hub.save(self.model, out, tokenizer=None if named is None else load_tokenizer(named))
            except ValueError as error:  # the run is worth its last checkpoint all the same
                print(f"{out} gets no model folder: {error}")

    def _update(self, batch: Batch) -> Scalars:
        """One optimizer update. Returns the loss of each task that had a label."""
        config, step = self.config, self.step + 1
        names = [task.name for task in self.trained]
        if config.tasks_per_step is not None:
            drawn = torch.randperm(len(names), generator=self.task_sampler)[: config.tasks_per_step]
            names = [names[i] for i in sorted(drawn.tolist())]
        batch = {key: value for key, value in batch.items() if key == self.input or key in names}
        ids = None
        if config.batches == "alternating":
            names = [names[self.step % len(names)]]
        elif config.batches == "mixed":
            own = torch.Generator().manual_seed((config.seed * 1_000_003 + self.step) % 2**63)
            ids = one_task_each(batch, self.tasks, own)
        # labels per task, counted before they move to the device so that nothing has to be waited for
        counts = {t.name: int(t.valid(batch[t.name]).sum()) for t in self.tasks if t.name in names and t.name in batch}
        tasks = [task for task in self.tasks if counts.get(task.name)]
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * lr_factor(self.step, config) * group.get("scale", 1.0)
        if not tasks:
            return {}

        self.parallel.train()
        for module in self.still:
            module.eval()
        for module in self.model.modules():
            if isinstance(module, Gate):
                module.anneal(self.step / config.steps)
        self.optimizer.zero_grad(set_to_none=True)
        losses: Scalars = dict.fromkeys((task.name for task in tasks), 0.0)
        samples = count_rows(batch[self.input])
        for rows in torch.arange(samples).tensor_split(min(config.accumulate, samples)):
            whole = len(rows) == samples
            part = {
                key: tree_map(lambda t: (t if whole else t[rows]).to(self.device), batch[key])  # noqa: B023
                for key in (self.input, *losses)
            }
            share = len(rows) / samples
            found, routings, auxiliary = self._losses(part, tasks, None if ids is None else ids[rows].to(self.device))
            # a part's mean counts by its share of the batch's labels; dividing by its share of the samples, which the
            # total is multiplied with, keeps terms of the balancer that are not per label whole
            pieces = {}
            for task in tasks:
                labels = int(task.valid(batch[task.name][rows]).sum())
                pieces[task.name] = found[task.name] * (labels / counts[task.name])
            values = torch.stack([piece.detach().float() for piece in pieces.values()]).tolist()
            for task, value in zip(tasks, values, strict=True):
                if not math.isfinite(value):
                    raise self._diverged(f"the loss of task {task.name!r} is {value}", step)
                losses[task.name] += value
            total = self.balancer({name: piece / share for name, piece in pieces.items()}) * share
            extra, extras = regularizers.total(routings, self._coefficients(), config.regularizer_args)
            extras |= {name: value.detach() for name, value in auxiliary.items()}
            self._note({f"regularizer/{name}": float(value) for name, value in extras.items()})
            extra = extra.to(total.device) + sum(auxiliary.values())
            self.accelerator.backward(total + share * extra)

        clip = config.grad_clip or math.inf
        alone = self.model.models.values() if isinstance(self.model, SingleTaskSet) else [self.model]
        # each of several independent models is clipped as it would be alone; the norm noted is that of all of them
        norms = [nn.utils.clip_grad_norm_(model.parameters(), clip) for model in alone]
        norm = float(torch.stack(norms).norm())
        if not math.isfinite(norm):
            raise self._diverged(f"the gradient's norm is {norm} (losses: {losses})", step)
        self.optimizer.step()
        self._note({f"loss/{name}": value for name, value in losses.items()} | {"grad_norm": norm})
        return losses

    def _coefficients(self) -> Mapping[str, float]:
        """The regularizers of the next update."""
        config = self.config
        return config.regularizers if self.step >= config.regularize_from * config.steps else {}

    def _losses(
        self, part: Batch, tasks: list[Task], ids: Tensor | None
    ) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Tensor]]:
        """Losses on some samples, all tasks' or that of each sample's own; what was routed; the model's own losses."""
        config, which = self.config, [task.name for task in tasks] if ids is None else ids
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            if config.inner_lr > 0:
                how = {"inner_lr": config.inner_lr, "share": config.inner_share, "second_order": config.second_order}
                return *two_step_losses(self.parallel, part[self.input], part, tasks, **how), {}
            predictions, routings = self.parallel(part[self.input], tasks=which, return_routing=True)
        if ids is not None:
            losses = {
                task.name: task.compute_loss(predictions[task.name][1], part[task.name][predictions[task.name][0]])
                if task.name in predictions
                else torch.zeros((), device=self.device)
                for task in tasks
            }
        else:
            losses = {task.name: task.compute_loss(predictions[task.name], part[task.name]) for task in tasks}
        own = getattr(self.model, "auxiliary_losses", None)
        return losses, routings, {} if own is None else own(predictions)

    def evaluate(self, dataset: Any) -> dict[str, Any]:
        """Scores a data set: losses, metrics and routing, see `moe_mtl.validation.validate`.

        All random generators are left as they were.
        """
        before = checkpoints.random_state()
        order = in_order(dataset, self.config.batch_size, self.config.val_limit)
        batches = self._loader(dataset, batch_sampler=order)
        found = validate(self.model, batches, self.trained, device=self.device, bf16=self.bf16)
        checkpoints.set_random_state(before)
        return found

    def _loader(self, dataset: Any, **how: Any) -> DataLoader:
        # its own generator: else making an iterator would draw from the global one
        own = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.step)
        together = partial(collate, tasks=self.trained, inputs=(self.input,))
        return DataLoader(dataset, num_workers=self.config.num_workers, generator=own, collate_fn=together, **how)

    def _note(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            entry = self.window.setdefault(name, [0.0, 0])
            entry[0] += value
            entry[1] += 1

    def _summary(self) -> dict[str, Any]:
        record: dict[str, Any] = {"loss": {}, "regularizer": {}}
        for name, (total, count) in self.window.items():
            kind, _, key = name.rpartition("/")
            (record[kind] if kind else record)[key] = total / count
        self.window = {}
        lr = self.config.lr * lr_factor(max(0, self.step - 1), self.config)
        return record | {"factor": self.balancer.factors(), "lr": lr, "seconds": self.seconds}

    def _diverged(self, what: str, step: int) -> TrainingDiverged:
        last = None if self.out is None else checkpoints.latest(self.out / CHECKPOINTS)
        where = f"the last good checkpoint is {last}" if last else "no checkpoint had been written yet"
        return TrainingDiverged(f"step {step}: {what}; training stopped, {where}. Try a lower lr or grad_clip")

    def _open_run(self, out: Path) -> dict[str, Any] | None:
        """Makes `out` ready and goes to its last checkpoint; returns its random state, or None for a new run."""
        last = last_checkpoint(out, self.config, self.run, self.table)
        state = None
        if last is not None:
            path, found = last
            if self.early is not None and (early := found.state.get("early")) is not None:
                self.early.load_state_dict(early)
                if self.early.over:
                    raise ValueError(
                        f"out: the run in {out} is finished (its patience was over after {found.step} steps); raise "
                        f"patience to train on, {INSTEAD}"
                    )
            state = self._restore(path, found)
        hub.replace_file(out / RUN, lambda path: path.write_text(json.dumps(self.run, indent=1) + "\n"))
        return state

    def _restore(self, path: Path, found: checkpoints.Checkpoint) -> dict[str, Any]:
        state = found.state
        checkpoints.check_tensors(path, "model", found.model, self.model.state_dict())
        checkpoints.check_tensors(path, "balancer", state["balancer"], self.balancer.state_dict())
        order = names_in_order(self.model, self.optimizer.param_groups)
        if state.get("order", order) != order:  # of names and shapes that fit; moments would be those of others
            raise ValueError(
                f"checkpoint {path} does not fit the model: its parameters came in another order; define them in that "
                "order again. Nothing was loaded"
            )
        try:
            self.optimizer.load_state_dict(state["optimizer"])  # checks its groups before it changes anything
        except ValueError as error:
            raise ValueError(f"checkpoint {path} does not fit the optimizer: {error}. Nothing was loaded") from error
        self.model.load_state_dict(found.model)
        self.balancer.load_state_dict(state["balancer"])
        self.task_sampler.set_state(state["task_sampler"])
        self.step, self.seconds, self.window = found.step, state["seconds"], state["window"]
        return state["random"]

    def _save(self, out: Path) -> None:
        state = {
            "optimizer": self.optimizer.state_dict(),
            "order": names_in_order(self.model, self.optimizer.param_groups),
            "balancer": self.balancer.state_dict(),
            "task_sampler": self.task_sampler.get_state(),
            "random": checkpoints.random_state(),
            "seconds": self.seconds,
            "window": self.window,
            "table": self.table,
            "early": None if self.early is None else self.early.state_dict(),
        }
        found = checkpoints.Checkpoint(self.step, self.model.state_dict(), state, self.run)
        checkpoints.write(out / CHECKPOINTS, found, self.config.keep)
