"""Write requests of a data set's test users: ``python -m pipelines.make_requests data=NAME``."""

import json
from pathlib import Path

import hydra

from torchrec_kvshare.commands.run import pipeline, run
from torchrec_kvshare.config import MakeRequestsConfig
from torchrec_kvshare.data.load import load_shards
from torchrec_kvshare.data.requests import in_partitions, make_requests
from torchrec_kvshare.data.splits import split_rule
from torchrec_kvshare.features.schema import HISTORY, History, Window


@hydra.main(version_base="1.3", config_path="../configs", config_name="make_requests")
@pipeline(MakeRequestsConfig)
def main(config: MakeRequestsConfig) -> None:
    """Read the data, write one request per line."""
    # Requests carry whole histories; the model cuts them to its window.
    rule = split_rule(config.split, config.split_times)
    shards = load_shards(config.data, [History(HISTORY, Window(1, 1))], rule=rule)
    requests = [*make_requests(shards, config.count, config.candidates, config.seed)]
    output = Path(config.output)
    requests_by_file = {output: requests}
    if config.partitions is not None:
        requests_by_file = {
            output / f"part-{number:05d}.jsonl": part
            for number, part in enumerate(in_partitions(requests, config.partitions))
        }
    for path, of_file in requests_by_file.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(request) + "\n" for request in of_file))
    print(f"wrote {len(requests)} requests to {output}")


if __name__ == "__main__":
    run(main)
