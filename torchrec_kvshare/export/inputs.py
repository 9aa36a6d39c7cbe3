"""Check the tensors that a host gives to a runtime; the same checks for every runtime.

They come before the look-ups: some kernels take a negative row for no row, and some read past the
end of a table. Runs in TorchScript.
"""

import torch
from torch import Tensor


def check_range(name: str, values: Tensor, least: int, most: int) -> None:
    """Refuse integers outside of a range; the error names the first."""
    if values.dtype != torch.int64:
        raise ValueError(f"{name} does not hold int64")
    if values.dim() != 1:
        raise ValueError(f"{name} has {values.dim()} dimensions; it must have 1")
    if values.size(0) == 0:
        return
    # For one request most tensors have one number.
    lowest, highest = (values, values) if values.size(0) == 1 else torch.aminmax(values)
    if int(lowest) < least or int(highest) > most:
        index = int(((values < least) | (values > most)).nonzero()[0])
        raise ValueError(
            f"{name} holds {int(values[index])} at index {index}; from {least} to {most} is allowed"
        )


def sums_by_row(numbers: Tensor, lengths: Tensor) -> Tensor:
    """Sum jagged numbers [R] by row [B]."""
    totals = torch.constant_pad_nd(numbers.cumsum(0), [1, 0])
    ends = lengths.cumsum(0)
    return totals[ends] - totals[ends - lengths]


def check_num_ids(num_ids: Tensor, most: int) -> None:
    """Refuse a request that has too many ids [B] in its bags; the error names its index."""
    if num_ids.size(0) > 0 and int(num_ids.max()) > most:
        index = int(num_ids.argmax())
        raise ValueError(
            f"request {index} has {int(num_ids[index])} ids in multi-valued columns; at most "
            f"{most} are allowed"
        )


def check_times(name: str, times: Tensor, request_time: int, first_index: int) -> None:
    """Refuse times [L] of one history that decrease or are not before the request's time.

    Args:
        name: of the tensor that holds them, for the error.
        times: Unix seconds.
        request_time: Unix seconds.
        first_index: index in that tensor of the first of ``times``.
    """
    if times.size(0) == 0:
        return
    steps_back = times[1:] < times[:-1]
    if int(times[-1]) < request_time and not bool(steps_back.any()):
        return
    # Not an in-place change of a slice: in TorchScript it had no effect.
    is_wrong = (times >= request_time) | torch.constant_pad_nd(steps_back, [1, 0])
    index = int(is_wrong.nonzero()[0])
    found = f"{name}[{first_index + index}] is {int(times[index])}, "
    if int(times[index]) >= request_time:
        raise ValueError(f"{found}not before the request's time {request_time}")
    raise ValueError(
        f"{found}before {name}[{first_index + index - 1}] = {int(times[index - 1])}: events are "
        "given oldest first"
    )


def check_finite(name: str, values: Tensor) -> None:
    """Refuse numbers that are not finite; the error counts them."""
    # One pass in place of three; the sum of finite numbers may overflow, so count before refusing.
    if not bool(torch.isfinite(values.sum())):
        num_wrong = int((~torch.isfinite(values)).sum())
        if num_wrong > 0:
            raise ValueError(f"{name}: {num_wrong} of {values.numel()} numbers are not finite")


def check_scores(logits: Tensor) -> None:
    """Refuse logits [C, tasks] that are not finite; the error names the first ten candidates."""
    if not bool(torch.isfinite(logits.sum())):
        wrong: list[int] = (~torch.isfinite(logits)).any(1).nonzero().flatten().tolist()
        if len(wrong) > 0:
            named = ", ".join([str(candidate) for candidate in wrong[:10]])
            more = f" and {len(wrong) - 10} more" if len(wrong) > 10 else ""
            raise ValueError(f"the model gave no finite score for candidates {named}{more}")
