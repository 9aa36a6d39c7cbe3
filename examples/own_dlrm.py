"""Add a shared history to your own DLRM: keep the tables, wrap the collection, score from pages.

The ranking model is TorchRec's, unmodified, and so is the collection of its own tables, which keep
their width: the tower and the tables of its tokens have others. The cache identifies a model by
digests of its weights, never by a name that the caller makes up.
"""

import torch
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from torchrec_kvshare.cache.kv_cache import KVCache
from torchrec_kvshare.cache.pages import PagePool
from torchrec_kvshare.cache.store import KVStore
from torchrec_kvshare.features.parse import parse_request
from torchrec_kvshare.features.schema import FeatureSchema, History, Vocabulary, Window
from torchrec_kvshare.history.kinds import TowerSpec
from torchrec_kvshare.history.tower import HistoryTower
from torchrec_kvshare.model.collection import KVShareEmbeddingBagCollection, token_tables
from torchrec_kvshare.model.ranking import RankingModel
from torchrec_kvshare.scoring.engine import Engine

OWN_DIM, TOKEN_DIM = 48, 16
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
tower = HistoryTower(spec, max_history=256, block=64)
collection = KVShareEmbeddingBagCollection(
    EmbeddingBagCollection(tables=own_tables),
    EmbeddingCollection(tables=token_tables(schema, TOKEN_DIM, spec.has_positions)),
    {"history": tower},
    schema,
)
model = DLRM(collection, schema.num_dense, [64, OWN_DIM], [64, 1]).eval()

request = parse_request(
    {
        "request_id": "r1",
        "user_id": 7,
        "time": 1700000000,
        "history": {"item_id": [3, 9, 4], "time": [1699990000, 1699990100, 1699990200]},
        "candidates": {"item_id": [11, 12, 13], "price": [3.5, 20.0, 8.0]},
    },
    schema,
)
pool = PagePool(2**24, 32, *tower.kv_shape)
ranking = RankingModel(model).eval()
cached = Engine(ranking, schema, KVStore([KVCache(pool)]))
uncached = Engine(ranking, schema, store=None)
for engine in (uncached, cached, cached):
    answer = engine.rank([request])[0]
    print(answer.cache.status, [round(score, 4) for score in answer.scores])

# Other weights in the same model are another version: K/V of the old weights is not used again.
model.load_state_dict({name: 0.9 * weight for name, weight in model.state_dict().items()})
renewed = cached.rank([request])[0]
print(renewed.cache.status, renewed.cache.reason, [round(score, 4) for score in renewed.scores])
difference = torch.tensor(renewed.scores) - torch.tensor(uncached.rank([request])[0].scores)
assert difference.abs().max() <= 2e-6
