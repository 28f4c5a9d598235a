"""vLLM serves a task of a `.tall` file, and switches between tasks in place.

Installing tallcodec beside vLLM registers the load format "tall" (entry point
`vllm.general_plugins`):

    llm = LLM("folder/", load_format="tall",
              model_loader_extra_config={"file": "llama.tall", "task": "cars"},
              worker_extension_cls="tallcodec.vllm.Switching")
    llm.generate(...)
    tallcodec.vllm.switch(llm, "dtd")

`folder/` has the model's configuration and tokenizer, no weights: :func:`write_folder` makes it.
The extra configuration takes "file", "task" (left out or None: the base) and "base", where the file
only references it.
"""

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import ArgumentError, TensorMismatchError
from .file import File
from .file import open as open_file


def register() -> None:
    """Register the load format. vLLM calls this in each of its processes."""
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    @register_model_loader("tall")
    class Loader(BaseModelLoader):
        """Gives vLLM's own loading, which knows names and joins projections, a task's tensors."""

        def __init__(self, load_config: Any):
            super().__init__(load_config)
            self._file, self._task = _opened(load_config.model_loader_extra_config)

        def download_model(self, model_config: Any) -> None:
            pass

        def get_all_weights(self, model_config: Any, model: Any) -> Iterator[tuple[str, Any]]:
            yield from self._file.state_dict(self._task).items()

        def load_weights(self, model: Any, model_config: Any) -> None:
            loaded = model.load_weights(self.get_all_weights(model_config, model))
            missing = set() if loaded is None else {n for n, _ in model.named_parameters()} - loaded
            if missing and model_config.quantization is None:
                raise TensorMismatchError(
                    f"{len(missing)} parameters are not in the task, such as {min(missing)!r}"
                )


class Switching:
    """What `worker_extension_cls` adds to vLLM's workers."""

    def switch_task(self, task: str | None) -> None:
        """Put the model on another task of the file, in place. Everything is checked before; if
        loading fails all the same, the old task is loaded again.

        The prefix cache is not the worker's: reset it, too. Raises TaskNotFoundError,
        ChecksumError and what else :meth:`tallcodec.File.load` raises.
        """
        before = dict(self.vllm_config.load_config.model_loader_extra_config)
        file, old = _opened(before)
        file.load(task)
        names = [set(file._names(file._number(name))) for name in (old, task)]
        if names[0] != names[1]:  # what one lacks would stay as the other has it
            raise TensorMismatchError(
                f"tasks {old!r} and {task!r} have different tensors, such as "
                f"{min(names[0] ^ names[1])!r}: the model cannot be switched between them"
            )
        try:
            self._put(before | {"task": task})
        except BaseException:
            self._put(before)
            raise

    def _put(self, extra: dict[str, Any]) -> None:
        self.update_config({"load_config": {"model_loader_extra_config": extra}})
        self.reload_weights()


def switch(llm: Any, task: str | None) -> None:
    """Switch all workers of an ``LLM`` that was made with
    ``worker_extension_cls="tallcodec.vllm.Switching"`` to a task, and forget what is cached of the
    old one. No request may be running."""
    llm.collective_rpc("switch_task", args=(task,))
    llm.reset_prefix_cache()


def write_folder(
    file: str | os.PathLike | File, task: str | None, folder: str | os.PathLike
) -> None:
    """Write the small files of a task (configuration, tokenizer) to a folder that vLLM can be
    pointed to."""
    if not isinstance(file, File):
        with open_file(file, "np") as opened:
            return write_folder(opened, task, folder)
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, content in file.files(task).items():
        Path(folder, name).write_bytes(content)


def _opened(extra: Any) -> tuple[File, str | None]:
    """The file and the task that an extra configuration names."""
    known = {"file", "task", "base"}
    if not isinstance(extra, dict) or "file" not in extra or extra.keys() - known:
        raise ArgumentError(
            'load_format="tall" needs model_loader_extra_config={"file": ..., "task": ...} (and '
            f'"base", where the file references it), not {extra!r}'
        )
    return _open(extra["file"], extra.get("base")), extra.get("task")


@functools.lru_cache(maxsize=1)
def _open(path: str, base: str | None) -> File:
    return open_file(path, "pt", base)
