"""Score a user's candidates twice: ``python examples/score_one_user.py ARTIFACT`` (synthetic)."""

import sys
from pathlib import Path

from torchrec_kvshare.export.exporter import load_artifact
from torchrec_kvshare.export.open import new_engine
from torchrec_kvshare.features.parse import parse_request

artifact = load_artifact(Path(sys.argv[1]))
engine = new_engine(artifact)
history = {"item_id": [3, 9, 4], "action": ["view", "buy", "view"], "category": [[1], [1], [7]]}
candidates = {"item_id": [11, 12, 13], "category": [[1], [7], [2]], "price": [3.5, 20.0, 8.0]}
raw = {"user_id": 7, "time": 1700000000, "context": {"country": ["GB"]}, "candidates": candidates}
raw["history"] = history | {"time": [1699990000, 1699990100, 1699990200]}
for _ in range(2):
    answer = engine.rank([parse_request(raw, artifact.schema)])[0]
    print(answer.cache.status, [round(score, 4) for score in answer.scores])
