"""Tensors of the caller's framework as memory: made, checked and addressed."""

from typing import Any

import numpy as np

from . import _core
from .errors import ArgumentError, TensorMismatchError
from .tensors import DTYPES, dtype_name, torch_dtype

# New memory of as many bytes is asked for in huge pages, as NumPy does of itself: page by page
# it takes longer to come than to be decoded into.
_HUGE = 4 << 20

_FRAMEWORKS = {"pt": "pt", "torch": "pt", "np": "np", "numpy": "np"}


def check_framework(name: str) -> str:
    """ "pt" or "np". Raises ArgumentError for another name, or where torch is not installed."""
    if name not in _FRAMEWORKS:
        known = ", ".join(repr(n) for n in _FRAMEWORKS)
        raise ArgumentError(f"framework must be one of {known}, not {name!r}")
    if _FRAMEWORKS[name] == "pt":
        try:
            import torch  # noqa: F401
        except ImportError as error:
            raise ArgumentError(
                'framework "pt" needs PyTorch: install it, or pass framework="np"'
            ) from error
    return _FRAMEWORKS[name]


def check_device(framework: str, device: Any) -> Any:
    """The torch device that is meant, or None for none. Raises ArgumentError where there is none of
    that name, or where it is neither the CPU nor a CUDA device."""
    if device is None or framework == "np":
        if device is not None and str(device) != "cpu":
            raise ArgumentError(f'framework "np" decodes to the CPU, not to {device}: use "pt"')
        return None
    import torch

    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ArgumentError(f"device {device!r}: {error}") from error
    if device.type == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if (device.index or 0) >= count:
        raise ArgumentError(f"device {device}: there are the CPU and {count} CUDA devices")
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.device("cuda", index)


def empty(framework: str, dtype: str, shape: tuple[int, ...], device: Any = None) -> Any:
    """A new tensor, on the CPU or a torch device."""
    if framework == "np":
        return np.empty(shape, DTYPES[dtype].numpy)
    import torch

    tensor = torch.empty(shape, dtype=torch_dtype(dtype), device=device or "cpu")
    if tensor.nbytes >= _HUGE and tensor.device.type == "cpu":
        _core.advise_huge(tensor.data_ptr(), tensor.nbytes)
    return tensor


def pointer(tensor: Any) -> int:
    return tensor.ctypes.data if isinstance(tensor, np.ndarray) else tensor.data_ptr()


def flat(tensor: Any) -> Any:
    """Its contiguous memory in one dimension, of which autograd knows nothing."""
    return tensor.reshape(-1) if isinstance(tensor, np.ndarray) else tensor.detach().view(-1)


def copy(source: Any, target: Any) -> None:
    """Copy a torch tensor to one of any device, whether or not it is for autograd or inference."""
    import torch

    with torch.inference_mode():
        target.copy_(source)


def device_of(tensor: Any) -> Any:
    """The torch device that it is on, or None for a NumPy array."""
    return None if isinstance(tensor, np.ndarray) else tensor.device


def address(name: str, tensor: Any, dtype: str, shape: tuple[int, ...]) -> int:
    """The address of a caller's tensor, which must be just what is decoded into it, on the CPU."""
    tensor = memory(name, tensor, dtype, shape)
    if device_of(tensor) is not None and tensor.device.type != "cpu":
        raise TensorMismatchError(f"out[{name!r}] is on {tensor.device}; it must be on the CPU")
    return pointer(tensor)


def memory(name: str, tensor: Any, dtype: str, shape: tuple[int, ...], device: Any = None) -> Any:
    """A caller's tensor, which must be just what is decoded into it, on the CPU or a CUDA device,
    and, if it is torch's, on ``device``, where that is given. What is neither torch's nor NumPy's
    becomes, by DLPack, a torch tensor of the same memory."""
    if not isinstance(tensor, np.ndarray) and not hasattr(tensor, "data_ptr"):
        tensor = _from_dlpack(name, tensor)
    found = dtype_name(tensor.dtype) or str(tensor.dtype)
    if (found, tuple(tensor.shape)) != (dtype, shape):
        raise TensorMismatchError(
            f"out[{name!r}] is {found} {tuple(tensor.shape)}, the task's tensor is {dtype} {shape}"
        )
    found = flaw(tensor)
    if found:
        raise TensorMismatchError(
            f"out[{name!r}] is {found}; it must be contiguous, writable memory of the CPU or of a "
            "CUDA device"
        )
    if None not in (device, device_of(tensor)) and tensor.device != device:
        raise TensorMismatchError(f"out[{name!r}] is on {tensor.device}, not on {device}")
    return tensor


def _from_dlpack(name: str, tensor: Any) -> Any:
    if not hasattr(tensor, "__dlpack__"):
        raise TensorMismatchError(
            f"out[{name!r}] is a {type(tensor).__name__}, not a torch tensor or a NumPy array, and "
            "has no __dlpack__"
        )
    try:
        import torch

        return torch.from_dlpack(tensor)
    except Exception as error:  # whatever its maker raises
        raise TensorMismatchError(
            f"out[{name!r}] cannot be written to by DLPack: {error}"
        ) from error


def flaw(tensor: Any) -> str:
    """What keeps a tensor from being decoded into, or ""."""
    if isinstance(tensor, np.ndarray):
        if not tensor.flags.writeable:
            return "read-only"
        if not tensor.dtype.isnative:
            return "of another byte order"
        return "" if tensor.flags.c_contiguous else "not contiguous"
    if tensor.device.type not in ("cpu", "cuda"):
        return f"on {tensor.device}"
    if str(tensor.layout) != "torch.strided" or tensor.is_nested:
        return "sparse or nested"
    if not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
        return "not contiguous"
    return "without memory of its own" if tensor.numel() and not tensor.data_ptr() else ""
