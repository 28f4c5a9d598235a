"""transformers' models: loaded from a `.tall` file, and their memory by checkpoints' names."""

import os
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from .errors import ArgumentError, SwitchError
from .file import File
from .file import open as open_file


def from_pretrained(
    file: str | os.PathLike | File,
    task: str | None,
    cls: Any = None,
    *,
    base: str | os.PathLike | Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """A transformers model on a task: what ``cls.from_pretrained`` makes of the decoded checkpoint,
    each tensor decoded when it is asked for, and nothing written but the small files (in a folder
    that is gone afterwards).

    The task, or the base (None), was encoded from a folder that ``save_pretrained`` made, or has
    its ``config.json``. ``cls`` is a model class or an Auto class; by default the class that the
    configuration names. ``options`` go to its ``from_pretrained`` (``dtype``, ``device_map``, …).

    Raises ArgumentError where there is no configuration, what :func:`tallcodec.open` and
    :meth:`File.decode` raise, and what transformers does.
    """
    try:
        import transformers
    except ImportError as error:
        raise ArgumentError("this needs transformers: install it") from error
    if not isinstance(file, File):
        with open_file(file, "pt", base) as opened:
            return from_pretrained(opened, task, cls, **options)
    files = file.files(task)
    if "config.json" not in files:
        raise ArgumentError(
            f"task {task!r} has no config.json: encode the folder that save_pretrained makes"
        )
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            Path(folder, name).write_bytes(content)
        config = options.pop("config", None)
        if config is None:  # which takes those of the options that are its own
            kept = {key: options.pop(key) for key in ("dtype", "torch_dtype") if key in options}
            config, options = transformers.AutoConfig.from_pretrained(
                folder, return_unused_kwargs=True, **options
            )
            options |= kept
        if cls is None:
            named = (config.architectures or [None])[0]
            cls = getattr(transformers, named or "", None)
            if cls is None:
                raise ArgumentError(
                    f"the configuration names no model class of transformers ({named!r}): pass cls"
                )
        mapping = getattr(cls, "_model_mapping", None)  # an Auto class, which wants a path
        if mapping is not None:
            if type(config) not in mapping:
                raise ArgumentError(f"{cls.__name__} has no class for a {config.model_type!r}")
            cls = mapping[type(config)]
        state = file.state_dict(task)
        made = cls.from_pretrained(None, config=config, state_dict=state, **options)
        model = made[0] if isinstance(made, tuple) else made  # with output_loading_info
        if model.can_generate() and "generation_config" not in options:
            if "generation_config.json" in files:
                model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
        return made


def targets(model: Any, names: Collection[str] = ()) -> dict[str, Any]:
    """The memory of a transformers model by the names that its checkpoints use: tensors that share
    it, of renamed parameters, and views of parameters that are several tensors of a checkpoint in
    one (experts, joined projections), wherever those lie in them. Where ``names``, a file's, have
    the prefix of the base model that the model's lack (``bert.``), or the other way about, it is
    added or left out, as transformers does on loading.

    Raises SwitchError where the elements of a checkpoint's tensor lie in no regular order.
    """
    state = model.state_dict()
    return _with_prefix(_parts(model, state), f"{model.base_model_prefix}.", names)


def _with_prefix(found: dict[str, Any], prefix: str, names: Collection[str]) -> dict[str, Any]:
    added = {prefix + name: tensor for name, tensor in found.items()}
    bare = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    return max((found, added, bare), key=lambda named: len(named.keys() & set(names)))


def _parts(model: Any, state: dict[str, Any]) -> dict[str, Any]:
    """The tensors of a model's checkpoint, in its memory."""
    from transformers.core_model_loading import revert_weight_conversion

    named = revert_weight_conversion(model, state)
    owners = {t.untyped_storage().data_ptr() for t in state.values()}
    result = {n: t for n, t in named.items() if t.untyped_storage().data_ptr() in owners}
    if len(result) == len(named):
        return result
    alone = {name: revert_weight_conversion(model, {name: state[name]}) for name in state}
    for name, parts in alone.items():
        if parts.keys() <= result.keys():
            continue
        ids = _numbered(state[name])
        for part, positions in revert_weight_conversion(model, {name: ids}).items():
            result[part] = _view(state[name], positions, part)
    missing = [name for name in named if name not in result]
    if missing:
        raise SwitchError(
            f"{missing[0]!r} and {len(missing) - 1} more are made of several parameters each"
        )
    return result


def _numbered(tensor: Any) -> Any:
    """A tensor of the same shape whose elements are 0, 1, 2, …"""
    import torch

    dtype = torch.int32 if tensor.numel() < 1 << 31 else torch.int64
    return torch.arange(tensor.numel(), dtype=dtype, device="cpu").view(tensor.shape)


def _view(tensor: Any, positions: Any, name: str) -> Any:
    """The elements of a tensor at these positions of its row-major order, as a view."""
    import torch

    if not tensor.is_contiguous():
        raise SwitchError(f"the parameter that holds {name!r} is not contiguous")
    first = int(positions.flatten()[0]) if positions.numel() else 0
    strides = []
    for dim, size in enumerate(positions.shape):
        step = positions.select(dim, 1).flatten()[0] - first if size > 1 else 1
        strides.append(int(step))
    expected = torch.tensor(first)
    for dim, (size, stride) in enumerate(zip(positions.shape, strides)):
        steps = torch.arange(size).mul_(stride)
        expected = expected + steps.view(-1, *[1] * (positions.ndim - 1 - dim))
    if not torch.equal(expected, positions.long()):
        raise SwitchError(f"the elements of {name!r} lie in no regular order in the model")
    offset = tensor.storage_offset() + first
    return torch.as_strided(tensor, positions.shape, strides, offset)
