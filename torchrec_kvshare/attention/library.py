"""The operators' registration: from the C++ library where it loads, else from ``plain.py``."""

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
# Arguments that have gradients, by place.
DIFFERENTIABLE = {"history_attention": (0, 2, 3), "candidate_attention": (0, 1, 2, 4, 5, 12, 13)}

logger = logging.getLogger(__name__)


@functools.cache
def register_operators() -> bool:
    """Register the operators in this process, once.

    Returns:
        Whether the C++ library computes them; the log says why not.
    """
    reason = _load_library()
    if reason:
        logger.warning("attention: in PyTorch's own operators: %s", reason)
    _register_plain(has_library=not reason)
    return not reason


def library_path() -> Path:
    """Where the library for this CPU and this torch is, if it was built."""
    version = torch.__version__.split("+")[0]
    capability = torch.backends.cpu.get_cpu_capability()
    return FOLDER / f"_native_{capability.lower()}-torch{version}.so"


def _load_library() -> str:
    """Load the library; why it cannot be, or nothing."""
    library = library_path()
    if not library.exists():
        built = sorted(path.name for path in FOLDER.glob("_native_*.so"))
        return f"{library.name} is needed; {built} were built when the package was installed"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"{library.name} cannot be loaded: {error}"
    return ""


# Libraries of PyTorch live as long as these.
_registered: list[torch.library.Library] = []


def _register_plain(has_library: bool) -> None:
    bodies: dict[str, Callable[..., Any]] = {
        "history_attention": plain.plain_history_attention,
        "candidate_attention": plain.plain_candidate_attention,
        "rows_linear": plain.plain_rows_linear,
    }
    for name, places in DIFFERENTIABLE.items():
        bodies[f"{name}_backward"] = _backward(bodies[name], places)
    library = torch.library.Library(NAMESPACE, "FRAGMENT" if has_library else "DEF")
    _registered.append(library)
    for name, body in bodies.items():
        arguments, num_results = SCHEMAS[name]
        results = ", ".join(["Tensor"] * num_results)
        if has_library:
            # The library calls these where it does not compute.
            library.define(f"plain_{name}({arguments}) -> ({results})")
            library.impl(f"plain_{name}", body, "CompositeExplicitAutograd")
            library.impl(name, body, "CUDA")
        else:
            library.define(f"{name}({arguments}) -> ({results})")
            library.impl(name, body, "CompositeExplicitAutograd")
            library.impl(name, _shapes(name), "Meta")
    if not has_library:
        for name in DIFFERENTIABLE:
            _register_autograd(name)


def _backward(
    body: Callable[..., tuple[Tensor, Tensor]], places: tuple[int, ...]
) -> Callable[..., tuple[Tensor, ...]]:
    """Gradients of a body by computing it again."""

    def backward(
        out_gradient: Tensor, _out: Tensor, _log_sums: Tensor, *arguments: Any
    ) -> tuple[Tensor, ...]:
        leaves = list(arguments)
        for place in places:
            leaves[place] = leaves[place].detach().requires_grad_()
        with torch.enable_grad():
            out, _ = body(*leaves)
        inputs = [leaves[place] for place in places]
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
    places = DIFFERENTIABLE[name.removesuffix("_backward")]
    return lambda _gradient, _out, _log_sums, *arguments: tuple(
        torch.empty_like(arguments[place]) for place in places
    )


def _register_autograd(name: str) -> None:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*output, *(i for i in inputs if isinstance(i, Tensor)))
        ctx.options = [i for i in inputs if not isinstance(i, Tensor)]
        ctx.num_inputs = len(inputs)

    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        operator = getattr(torch.ops.torchrec_kvshare, f"{name}_backward")
        gradients = operator(gradient, *ctx.saved_tensors, *ctx.options)
        by_place = dict(zip(DIFFERENTIABLE[name], gradients, strict=True))
        return tuple(by_place.get(place) for place in range(ctx.num_inputs))

    torch.library.register_autograd(
        f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_registered[0]
    )
