"""Train your own DLRM with a shared history on several ranks, its tables spread over them.

On two ranks, or in one process:

    torchrun --nproc_per_node 2 examples/own_dlrm_distributed.py
    python examples/own_dlrm_distributed.py

The ranking model and the collection of its own tables are TorchRec's, unmodified; these tables are
wider than the tower and than the tables of its tokens. Each rank trains
on requests of its own; TorchRec's planner places all tables, yours and the history's.
"""

import torch
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from torchrec_kvshare.features.batches import collate
from torchrec_kvshare.features.draw import draw_ragged_requests
from torchrec_kvshare.features.schema import FeatureSchema, History, Vocabulary, Window
from torchrec_kvshare.history.kinds import TowerSpec
from torchrec_kvshare.history.tower import HistoryTower
from torchrec_kvshare.model.collection import KVShareEmbeddingBagCollection, token_tables
from torchrec_kvshare.training.ranks import joined_ranks
from torchrec_kvshare.training.sharding import TableSettings, plan_table, shard

OWN_DIM, TOKEN_DIM, NUM_STEPS = 48, 16, 5
spec = TowerSpec(
    "causal", dim=32, num_layers=2, num_heads=4, token_dim=TOKEN_DIM, output_dim=OWN_DIM
)
schema = FeatureSchema(
    vocabulary_by_column={
        "user_id": Vocabulary([str(user) for user in range(100)]),
        "item_id": Vocabulary([str(item) for item in range(500)]),
    },
    context=(),
    item_attributes=(),
    item_floats=("price",),
    histories=(History("history", Window(max_history=256, block=64)),),
)
own_tables = [
    EmbeddingBagConfig(
        name="users",
        embedding_dim=OWN_DIM,
        num_embeddings=schema.num_table_rows("user_id"),
        feature_names=["user_id"],
    ),
    EmbeddingBagConfig(
        name="products",
        embedding_dim=OWN_DIM,
        num_embeddings=schema.num_table_rows("item_id"),
        feature_names=["candidates.item_id"],
    ),
]
torch.manual_seed(0)  # all ranks start with the same weights
collection = KVShareEmbeddingBagCollection(
    EmbeddingBagCollection(tables=own_tables),
    EmbeddingCollection(tables=token_tables(schema, TOKEN_DIM, spec.has_positions)),
    {"history": HistoryTower(spec, max_history=256, block=64)},
    schema,
)
model = DLRMTrain(DLRM(collection, schema.num_dense, [64, OWN_DIM], [64, 1]))

with joined_ranks(torch.device("cpu")) as ranks:
    # One table's rows are spread over all ranks; the planner places the others as it likes.
    tables = TableSettings("rowwise_adagrad", 0.05, sharding={"token_item_id": ["row_wise"]})
    sharded, plan = shard(model, tables, ranks)
    if ranks.is_first:
        print(plan_table(plan))
    dense = KeyedOptimizerWrapper(
        dict(in_backward_optimizer_filter(sharded.named_parameters())),
        lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
    )
    optimizer = CombinedOptimizer([("tables", sharded.fused_optimizer), ("dense", dense)])
    batch = collate(draw_ragged_requests(schema, seed=100 * ranks.rank), schema)
    batch.labels = (batch.dense_features[:, -1] > 0).float()  # bought, if the price is above zero
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        loss, _ = sharded(batch)
        # The ranks' mean gradient is that of all candidates: every rank has as many.
        loss.backward()
        optimizer.step()
        mean = ranks.sum(loss.detach().clone()) / ranks.world_size
        if ranks.is_first:
            print(f"step {step} loss {mean.item():.4f}")
