"""Registers the operators: from the C++ library if it loads, else from ``plain.py``."""

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchrec_kvshare.attention import plain

NAMESPACE = "torchrec_kvshare"
FOLDER = Path(__file__).parent
HISTORY = (
    "Tensor queries, Tensor query_offsets, Tensor keys, Tensor values, Tensor key_offsets, "
    "Tensor cached_keys, Tensor cached_values, Tensor page_ids, Tensor page_offsets, "
    "Tensor cached_offsets, int window, int num_globals, str scoring"
)
CANDIDATES = (
    "Tensor queries, Tensor own_keys, Tensor own_values, Tensor candidate_offsets, Tensor keys, "
    "Tensor values, Tensor page_ids, Tensor page_offsets, Tensor row_offsets, Tensor row_times, "
    "Tensor candidate_times, Tensor visible_rows, Tensor time_bias, Tensor place_bias, "
    "int window, str scoring"
)
SAVED = "Tensor out_gradient, Tensor out, Tensor log_sums, "
SCHEMAS = {
    "history_attention": (HISTORY, 2),
    "candidate_attention": (CANDIDATES, 2),
    "history_attention_backward": (SAVED + HISTORY, 3),
    "candidate_attention_backward": (SAVED + CANDIDATES, 7),
    "rows_linear": ("Tensor rows, Tensor weight, Tensor bias", 1),
}
# Indices of the arguments that have gradients.
LOWER_PRECISION = (torch.bfloat16, torch.float16)
DIFFERENTIABLE = {"history_attention": (0, 2, 3), "candidate_attention": (0, 1, 2, 4, 5, 12, 13)}

logger = logging.getLogger(__name__)


@functools.cache
def register_operators() -> bool:
    """Register the operators in this process, once.

    Returns:
        Whether the C++ library is the backend for float32 on CPU; if not, the log says why.
    """
    reason = _load_library()
    if reason:
        logger.warning("attention: backend is plain PyTorch: %s", reason)
    _register_plain(has_library=not reason)
    return not reason


def library_path() -> Path:
    """Return the path of the library for this CPU and this torch, built or not."""
    version = torch.__version__.split("+")[0]
    capability = torch.backends.cpu.get_cpu_capability()
    return FOLDER / f"_native_{capability.lower()}-torch{version}.so"


def _load_library() -> str:
    """Load the library; return why that failed, or an empty string."""
    library = library_path()
    if not library.exists():
        built = sorted(path.name for path in FOLDER.glob("_native_*.so"))
        return f"{library.name} is needed; {built} were built when the package was installed"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"{library.name} cannot be loaded: {error}"
    return ""


# The registrations live as long as these objects.
_registered: list[torch.library.Library] = []


def _register_plain(has_library: bool) -> None:
    backend_by_name: dict[str, Callable[..., Any]] = {
        "history_attention": plain.plain_history_attention,
        "candidate_attention": plain.plain_candidate_attention,
        "rows_linear": plain.plain_rows_linear,
    }
    for name, indices in DIFFERENTIABLE.items():
        backend_by_name[f"{name}_backward"] = _backward(backend_by_name[name], indices)
    library = torch.library.Library(NAMESPACE, "FRAGMENT" if has_library else "DEF")
    _registered.append(library)
    for name, backend in backend_by_name.items():
        arguments, num_results = SCHEMAS[name]
        results = ", ".join(["Tensor"] * num_results)
        if has_library:
            # The library calls these for other dtypes and devices.
            library.define(f"plain_{name}({arguments}) -> ({results})")
            library.impl(f"plain_{name}", backend, "CompositeExplicitAutograd")
            library.impl(name, backend, "CUDA")
        else:
            library.define(f"{name}({arguments}) -> ({results})")
            library.impl(name, backend, "CompositeExplicitAutograd")
            library.impl(name, _shapes(name), "Meta")
    for name in DIFFERENTIABLE:
        if not has_library:
            _register_autograd(name)
        for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
            library.impl(name, _in_float32(name, device), key)


def _in_float32(name: str, device: str) -> Callable[..., tuple[Tensor, ...]]:
    """Make the operator under autocast: it computes in float32.

    Of a lower precision, softmax and the sums over a long history would lose most. Not by
    ``torch.library.register_autocast``, which needs the operator before a library is complete.
    """

    def compute(*arguments: Any) -> tuple[Tensor, ...]:
        exact = [
            one.float() if isinstance(one, Tensor) and one.dtype in LOWER_PRECISION else one
            for one in arguments
        ]
        with torch.autocast(device, enabled=False):
            found: tuple[Tensor, ...] = getattr(getattr(torch.ops, NAMESPACE), name)(*exact)
        return found

    return compute


def _backward(
    backend: Callable[..., tuple[Tensor, Tensor]], indices: tuple[int, ...]
) -> Callable[..., tuple[Tensor, ...]]:
    """Make a backward that runs the forward again under autograd."""

    def backward(
        out_gradient: Tensor, _out: Tensor, _log_sums: Tensor, *arguments: Any
    ) -> tuple[Tensor, ...]:
        leaves = list(arguments)
        for index in indices:
            leaves[index] = leaves[index].detach().requires_grad_()
        with torch.enable_grad():
            out, _ = backend(*leaves)
        inputs = [leaves[index] for index in indices]
        return torch.autograd.grad(
            out, inputs, out_gradient, allow_unused=True, materialize_grads=True
        )

    return backward


def _shapes(name: str) -> Callable[..., Tensor | tuple[Tensor, ...]]:
    if name == "rows_linear":
        return lambda rows, weight, _: rows.new_empty([*rows.shape[:2], weight.size(1)])
    if name in DIFFERENTIABLE:
        return lambda queries, *_: (
            torch.empty_like(queries),
            queries.new_empty(queries.shape[:-1]),
        )
    indices = DIFFERENTIABLE[name.removesuffix("_backward")]
    return lambda _gradient, _out, _log_sums, *arguments: tuple(
        torch.empty_like(arguments[index]) for index in indices
    )


def _register_autograd(name: str) -> None:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*output, *(i for i in inputs if isinstance(i, Tensor)))
        ctx.options = [i for i in inputs if not isinstance(i, Tensor)]
        ctx.num_inputs = len(inputs)

    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        operator = getattr(torch.ops.torchrec_kvshare, f"{name}_backward")
        gradients = operator(gradient, *ctx.saved_tensors, *ctx.options)
        gradient_by_index = dict(zip(DIFFERENTIABLE[name], gradients, strict=True))
        return tuple(gradient_by_index.get(index) for index in range(ctx.num_inputs))

    torch.library.register_autograd(
        f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_registered[0]
    )
