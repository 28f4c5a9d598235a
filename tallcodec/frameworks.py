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


def empty(framework: str, dtype: str, shape: tuple[int, ...]) -> tuple[Any, int]:
    """A new tensor and the address of its memory."""
    if framework == "np":
        array = np.empty(shape, DTYPES[dtype].numpy)
        return array, array.ctypes.data
    import torch

    tensor = torch.empty(shape, dtype=torch_dtype(dtype), device="cpu")
    if tensor.nbytes >= _HUGE:
        _core.advise_huge(tensor.data_ptr(), tensor.nbytes)
    return tensor, tensor.data_ptr()


def address(name: str, tensor: Any, dtype: str, shape: tuple[int, ...]) -> int:
    """The address of a caller's tensor, which must be just what is decoded into it."""
    if not isinstance(tensor, np.ndarray) and not hasattr(tensor, "data_ptr"):
        raise TensorMismatchError(
            f"out[{name!r}] is a {type(tensor).__name__}, not a torch tensor or a NumPy array"
        )
    found = dtype_name(tensor.dtype) or str(tensor.dtype)
    if (found, tuple(tensor.shape)) != (dtype, shape):
        raise TensorMismatchError(
            f"out[{name!r}] is {found} {tuple(tensor.shape)}, the task's tensor is {dtype} {shape}"
        )
    found = flaw(tensor)
    if found:
        raise TensorMismatchError(
            f"out[{name!r}] is {found}; it must be contiguous, writable memory of the CPU"
        )
    return tensor.ctypes.data if isinstance(tensor, np.ndarray) else tensor.data_ptr()


def flaw(tensor: Any) -> str:
    """What keeps a tensor from being decoded into, or ""."""
    if isinstance(tensor, np.ndarray):
        if not tensor.flags.writeable:
            return "read-only"
        if not tensor.dtype.isnative:
            return "of another byte order"
        return "" if tensor.flags.c_contiguous else "not contiguous"
    if tensor.device.type != "cpu":
        return f"on {tensor.device}"
    if str(tensor.layout) != "torch.strided" or tensor.is_nested:
        return "sparse or nested"
    if not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
        return "not contiguous"
    return "without memory of its own" if tensor.numel() and not tensor.data_ptr() else ""
