"""Sharded tables give the scores of whole tables, on any ranks."""

from pathlib import Path

from tests.worlds import fresh_process

# Tables are placed on ranks so that the order of shards differs from the order of all configs.
RANK = '''
import logging, os, sys, warnings
warnings.simplefilter("ignore")
import torch
import torch.distributed as dist
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, table_wise
from torchrec.distributed.types import ShardingPlan
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from tests.worlds import SCHEMA, draw_raws, make_dlrm, parse_all, random_weights
from torchrec_kvshare.model.collection import KVShareEmbeddingBagCollection
from torchrec_kvshare.features.batches import collate, with_weights
from torchrec_kvshare.history.kinds import TowerSpec

logging.disable(logging.WARNING)
torch.set_num_threads(1)
rank, world_size, folder = int(sys.argv[1]), 2, sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
# fbgemm wants widths that 4 divides.
SPEC = TowerSpec("causal", 16, 2, 4, has_state=True, token_dim=8, output_dim=12)
SHARDERS = [EmbeddingBagCollectionSharder(), EmbeddingCollectionSharder()]


def over_plain_bags(is_weighted=False):
    """The history beside a collection of the user's own, as in examples/own_dlrm.py."""
    ours = make_dlrm(7, spec=SPEC).sparse_arch.embedding_bag_collection
    plain = EmbeddingBagCollection(ours.bags.embedding_bag_configs(), is_weighted)
    towers = {"history": ours.towers()[0]}
    collection = KVShareEmbeddingBagCollection(plain, ours.token_embeddings, towers, SCHEMA)
    model = DLRM(collection, SCHEMA.num_dense, [9, SPEC.output_dim], [9, 1])
    random_weights(model, 7)
    return model.eval()


def plan_of(model):
    plan = {}
    for name, module in model.named_modules():
        if isinstance(module, EmbeddingBagCollection):
            tables, sharder = module.embedding_bag_configs(), SHARDERS[0]
        elif isinstance(module, EmbeddingCollection):
            tables, sharder = module.embedding_configs(), SHARDERS[1]
        else:
            continue
        kinds = {
            config.name: table_wise(rank=(1 + index) % 2, compute_kernel="fused")
            for index, config in enumerate(tables)
        }
        plan[name] = construct_module_sharding_plan(
            module, kinds, sharder, local_size=2, world_size=2, device_type="cpu"
        )
    return ShardingPlan(plan=plan)


requests = parse_all(draw_raws([(9, 3, 1 + rank), (0, 2, 5 + rank), (14 - rank, 4, 9)]))
batch = collate(requests, SCHEMA)
genres = batch.sparse_features["candidates.genres"].values()
weights = {"candidates.genres": torch.linspace(-1.0, 2.0, genres.size(0))}
plain, weighted = batch.sparse_features, with_weights(batch.sparse_features, weights)
for make, features in (
    (lambda: make_dlrm(7, spec=SPEC), plain),
    (over_plain_bags, plain),
    (lambda: over_plain_bags(is_weighted=True), weighted),
):
    whole = make()
    sharded = make()
    plan = plan_of(sharded)
    device = torch.device("cpu")
    sharded = DistributedModelParallel(sharded, device=device, plan=plan, sharders=SHARDERS)
    sharded.load_state_dict(whole.state_dict())
    sharded.eval()
    with torch.no_grad():
        expected = whole(batch.dense_features, features)
        got = sharded(batch.dense_features, features)
    print((got - expected).abs().max().item())
dist.destroy_process_group()
'''
# Sharding only moves rows; two orders of the same sum differ by less than this.
TOLERANCE = 1e-6


def test_scores_do_not_depend_on_where_tables_lie(tmp_path: Path) -> None:
    """Features were named in the order of the configs: logits were off by 0.12 and more."""
    ranks = [fresh_process(RANK, str(rank), str(tmp_path)) for rank in range(2)]
    ends = [(rank.communicate(timeout=300), rank.returncode) for rank in ranks]
    for (out, err), status in ends:
        assert status == 0, err
        differences = [float(line) for line in out.splitlines()]
        assert len(differences) == 3
        assert max(differences) <= TOLERANCE
