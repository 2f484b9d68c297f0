"""Predictor: a trained model behind one call that takes what a user has and says what a user wants to know.

    predict = Predictor("m3vit_micro.procroom")
    predict("room.jpg", tasks=["scene", "depth"])   # {"scene": {"label": "wide_plain", ...}, "depth": metres [h, w]}
    predict(["a.jpg", "b.jpg"])                     # one such dict per picture, all tasks

One model serves every task: a call runs the pathway of the tasks it names, with weights that are there already, so a
task is switched for free. A copy or table of a task's experts would gain nothing: without it, too, a layer reads the
experts its tokens chose and no others.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moe_mtl import hub
from moe_mtl.answers import answer
from moe_mtl.bounded import load_bounded
from moe_mtl.inputs import reader_of
from moe_mtl.locate import TOKENIZER, find
from moe_mtl.multitask import evaluating, move, task_ids
from moe_mtl.tasks import Task, nearest

MEMORY = ("all", "bounded")


class Predictor:
    """Predicts with a model of this library, of pictures, tables or texts.

    Args:
        model: a model; or the folder, pretrained name or hub id of one, which is loaded.
        tasks: names of the tasks to run where a call names none; all when None.
        batch_size: samples that run at once.
        dtype: bfloat16 or float16 to compute products in, by autocast; weights, routers and what is read stay float32.
            Values of a regression then have the three or four digits of that type. None for the model's own.
        threads: CPU threads during a call; torch's own number when None. It is put back after the call.
        device: where to run; a model that is passed is moved there. None for where it is.
        tokenizer: of a model of texts, one of transformers, its folder or its name; None for the one in the folder.
        truncate: cut texts that are longer than the model takes rather than refuse them.
        memory: "all", or "bounded" to leave the experts in the folder's file and read those a layer is about to use,
            one layer's at a time. The answers are the same; see `moe_mtl.bounded`. On a CPU.

    Attributes:
        model: the model.
        tasks: the names of `tasks`.
        reader: how inputs are read, see `moe_mtl.inputs`. Another may be put in its place, such as one for other
            colours, `dataclasses.replace(predictor.reader, mean=(0.0,), std=(1.0,))`. Those of a backbone that `moefy`
            took are scaled as its weights want them, until the model is trained on colours of 0..1.

    Raises:
        FileNotFoundError: there is no such folder or name.
        ValueError: an unknown task; a size, dtype, device or memory that does not fit; a tokenizer that is missing or
            does not fit; or files that hold no model.
    """

    def __init__(
        self,
        model: nn.Module | str | os.PathLike[str],
        tasks: Sequence[str] | str | None = None,
        *,
        batch_size: int = 32,
        dtype: torch.dtype | None = None,
        threads: int | None = None,
        device: torch.device | str | None = None,
        tokenizer: Any = None,
        truncate: bool = False,
        memory: Literal["all", "bounded"] = "all",
    ):
        for name, value in (("batch_size", batch_size), ("threads", threads)):
            if value is not None and (not hasattr(value, "__index__") or value < 1):
                raise ValueError(f"{name}: got {value!r}, expected a whole number, at least 1")
        if dtype not in (None, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype: got {dtype}, expected torch.bfloat16, torch.float16, or None for the model's own")
        if memory not in MEMORY:
            raise ValueError(f"memory: unknown {memory!r}; {nearest(str(memory), MEMORY)}")
        where = _device(device)
        if memory == "bounded" and (isinstance(model, nn.Module) or (where is not None and where.type != "cpu")):
            raise ValueError(
                "memory: 'bounded' takes the folder or name of a model, whose file is read, and runs on a CPU"
            )
        if not isinstance(model, nn.Module):
            folder = find(model)
            if tokenizer is None and (folder / TOKENIZER).is_file():
                tokenizer = folder
            model = load_bounded(folder) if memory == "bounded" else hub.load(folder)
        if not hasattr(model, "tasks") or not hasattr(model, "input"):
            raise ValueError(f"model: got {type(model).__name__}, expected one of create_model, moefy, extract or load")
        self.model: Any = model if where is None else model.to(where)
        self.batch_size, self.dtype, self.threads = batch_size, dtype, threads
        self.tasks = tuple(task.name for task in self._chosen(tasks))
        self.reader = reader_of(self.model, tokenizer, truncate)

    def __call__(
        self, x: Any, tasks: Sequence[str] | str | None = None, *, raw: bool = False, threshold: float = 0.5
    ) -> Any:
        """Predicts.

        Args:
            x: a sample or a list of them. Pictures: PIL images, arrays, tensors (colours 0..1, or uint8), paths of
                files. Rows of a table: dicts of values by column, or a data frame. Texts: strings, pairs of strings as
                tuples, and, in a list, lists of words. Or samples of a data set, dicts with the input under its name,
                texts not yet in tokens.
            tasks: names of the tasks to run, those of the predictor when None.
            raw: give the model's predictions instead of answers: tensors of the shapes in `moe_mtl.tasks` without b,
                maps in the model's size, tags without padding.
            threshold: probability from which a label of a binary or multilabel task holds.

        Returns:
            {task: answer}, see `moe_mtl.answers`; for a list of samples a list of these, in the same order.

        Raises:
            ValueError: an unknown task, the nearest are listed; or a sample that cannot be read, of which the message
                says which.
        """
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold: got {threshold}, expected a probability, 0 to 1")
        chosen = self._chosen(self.tasks if tasks is None else tasks)
        samples, single = self.reader.open(x)
        results: list[dict[str, Any]] = [{} for _ in range(len(samples))]
        if not results:
            return results
        with self._running():
            for batch in self.reader.batches(samples, self.batch_size):
                predictions: Mapping[str, Tensor] = self.model(
                    self._ready(batch.x), tasks=[task.name for task in chosen]
                )
                for row, (i, note) in enumerate(zip(batch.numbers, batch.notes, strict=True)):
                    for task in chosen:
                        y = predictions[task.name][row]
                        if task.kind == "tagging":
                            y = y[:, : len(note.word_ids)]
                        results[i][task.name] = y if raw else answer(task, y, note, threshold)
        return results[0] if single else results

    def _chosen(self, names: Sequence[str] | str | None) -> list[Task]:
        """The tasks of these names, all for None."""
        known = self.model.tasks
        return list(known) if names is None else [known[i] for i in task_ids(known, names)]

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Evaluation mode without gradients, autocast and threads; all of it put back afterwards."""
        before = torch.get_num_threads()
        with ExitStack() as stack:
            stack.enter_context(evaluating(self.model))
            if self.dtype is not None:
                stack.enter_context(torch.autocast(self._like.device.type, self.dtype))
            if self.threads is not None:
                stack.callback(torch.set_num_threads, before)
                torch.set_num_threads(self.threads)
            yield

    def _ready(self, x: Any) -> Any:
        """An input on the model's device; images in its dtype, which it insists on."""
        x = move(x, self._like.device)
        return x.to(self._like.dtype) if isinstance(x, Tensor) and self.dtype is None else x

    @property
    def _like(self) -> Tensor:
        return next(self.model.parameters())


def _device(device: torch.device | str | None) -> torch.device | None:
    """The device of a name, once something could be put there.

    Raises:
        ValueError: there is no such device, or none that works.
    """
    if device is None:
        return None
    try:
        return torch.empty(1, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: got {str(device)!r}, which cannot be used here ({error})") from error
