"""Nothing between a batch and its scores or gradients reads a tensor back from its device.

Fake tensors on a GPU and tensors on device "meta" have no data: code that reads one raises.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tests.attention.cases import OPERATORS, TRAINED, example
from tests.encoder_worlds import EXTENDED_NAMES, NAMES, TASKS, raws_of, world_of
from tests.worlds import parse_all, see_prefixes
from torchrec_kvshare.attention import plain
from torchrec_kvshare.features.bags import Bags
from torchrec_kvshare.features.batches import collate, with_key
from torchrec_kvshare.features.schema import HISTORY, first_index_key, pages_key
from torchrec_kvshare.model.ranking import RankingModel

USERS = [(14, 3, 1), (0, 1, 2), (7, 2, 3)]
CUDA, META = torch.device("cuda"), torch.device("meta")


def batch_of_users(name: str) -> Batch:
    world = world_of(name)
    return collate(parse_all(raws_of(world, USERS), world.schema), world.schema)


def new_model(name: str) -> RankingModel:
    return RankingModel(copy.deepcopy(world_of(name).dlrm)).eval()


def with_pages(features: KeyedJaggedTensor, key: str, ids: Tensor) -> KeyedJaggedTensor:
    """Add a key with one id for each user: its page, or the index of its first event."""
    return with_key(features, key, Bags(ids, torch.ones_like(ids)))


class FakeGPU(FakeTensorMode):
    """Fake tensors on a GPU: no GPU is needed, and there is no data."""

    def hold(self, tensor: Tensor) -> Tensor:
        return FakeTensor(self, tensor.to(META), CUDA)

    def hold_model(self, model: RankingModel) -> RankingModel:
        for module in model.modules():
            for name, weight in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(self.hold(weight.detach())))
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, self.hold(buffer))
        return model

    def hold_batch(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        keys, inverse = features.inverse_indices()
        return KeyedJaggedTensor(
            keys=keys,
            values=self.hold(features.values()),
            lengths=self.hold(features.lengths()),
            stride_per_key_per_rank=features.stride_per_key_per_rank(),
            stride_per_key=features.stride_per_key(),
            length_per_key=features.length_per_key(),
            inverse_indices=(keys, self.hold(inverse)),
        )


class Indexing(TorchFunctionMode):
    """Replaces indexing by calls: torch without CUDA cannot index fake CUDA tensors."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is not Tensor.__getitem__:
            return function(*args, **(kwargs or {}))
        tensor, index = args
        index = index if isinstance(index, tuple) else (index,)
        if any(isinstance(one, Tensor) for one in index):
            indices = [one if isinstance(one, Tensor) else None for one in index]
            return torch.ops.aten.index.Tensor(tensor, indices)
        dim = 0
        for one in index:
            if isinstance(one, slice):
                first, end, _ = one.indices(tensor.size(dim))
                tensor = torch.narrow(tensor, dim, first, max(0, end - first))
                dim += 1
            else:
                assert isinstance(one, int)
                tensor = torch.select(tensor, dim, one)
        return tensor


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_scoring_reads_nothing_from_a_gpu(name: str) -> None:
    gpu, model, batch = FakeGPU(), new_model(name), batch_of_users(name)
    num_planes, *head_sizes = model.collection.towers()[0].kv_shape
    pages = with_pages(batch.sparse_features, pages_key(HISTORY), torch.arange(len(USERS)))
    pages, features = gpu.hold_batch(pages), gpu.hold_batch(batch.sparse_features)
    model, dense = gpu.hold_model(model), gpu.hold(batch.dense_features)
    with gpu, Indexing():
        table = torch.empty([num_planes, len(USERS), 64, *head_sizes], device=CUDA)
        [kv] = model.prefill(features)
        uncached = model(dense, features)
        cached = model.score(dense, pages, [table])
    assert {kv.device.type, uncached.device.type, cached.device.type} == {"cuda"}
    assert uncached.shape == cached.shape == (6, len(TASKS))


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_operators_backends_read_nothing_either(operator: str) -> None:
    """The rest of this file runs only their shape functions."""
    backend, gpu, arguments = getattr(plain, f"plain_{operator}"), FakeGPU(), example(operator)
    held = {n: gpu.hold(one) if isinstance(one, Tensor) else one for n, one in arguments.items()}
    with torch.no_grad(), gpu, Indexing():
        out, _ = backend(**held)
    assert (out.shape, out.device.type) == (arguments["queries"].shape, "cuda")
    on_meta = {n: one.to(META) if isinstance(one, Tensor) else one for n, one in arguments.items()}
    trained = [on_meta[name].requires_grad_() for name in TRAINED[operator]]
    out, _ = backend(**on_meta)
    gradients = torch.autograd.grad(out.sum(), trained)
    assert {one.device for one in (out, *gradients)} == {META}


@pytest.mark.parametrize("name", EXTENDED_NAMES)
@torch.no_grad()
def test_extending_reads_nothing_from_a_gpu(name: str) -> None:
    gpu, model, batch = FakeGPU(), new_model(name), batch_of_users(name)
    num_planes, *head_sizes = model.collection.towers()[0].kv_shape
    first_index = first_index_key(HISTORY)
    features = with_pages(batch.sparse_features, first_index, torch.zeros(3, dtype=torch.int64))
    features, model = gpu.hold_batch(features), gpu.hold_model(model)
    with gpu, Indexing():
        cached = torch.empty([num_planes, 9, *head_sizes], device=CUDA)
        cached_rows = torch.empty([3], dtype=torch.int64, device=CUDA)
        [kv] = model.extend(features, [cached], [cached_rows])
    assert kv.device.type == "cuda"


@pytest.mark.parametrize("name", NAMES)
def test_a_training_step_reads_nothing_from_its_device(name: str) -> None:
    model = new_model(name).train().to(META)
    batch = see_prefixes(batch_of_users(name), [0, 0, 0, 1, 2, 2], [7, 14, 3, 0, 7, 7])
    optimizer = torch.optim.AdamW(model.parameters())
    logits = model(batch.dense_features.to(META), batch.sparse_features.to(META))
    logits.sum().backward()
    optimizer.step()
    assert logits.device == META
    trained = [name for name, weight in model.named_parameters() if weight.grad is not None]
    assert any("time_bias" in name for name in trained)
