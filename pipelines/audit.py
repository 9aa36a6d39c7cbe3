"""Check a trained run against the cacheability contract: ``python -m pipelines.audit run=DIR``."""

import json
from pathlib import Path

import hydra

from torchrec_kvshare.commands.run import pipeline, run
from torchrec_kvshare.config import AuditConfig
from torchrec_kvshare.model.ranking import RankingModel
from torchrec_kvshare.training.run import load_trained
from torchrec_kvshare.verify.audit import audit_model, audit_table

AUDIT_FILE = "audit.json"


@hydra.main(version_base="1.3", config_path="../configs", config_name="audit")
@pipeline(AuditConfig)
def main(config: AuditConfig) -> None:
    """Audit the run, print how far K/V and scores moved, write audit.json."""
    model, schema = load_trained(Path(config.run))
    audit = audit_model(RankingModel(model).eval(), schema, config.seed)
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / AUDIT_FILE).write_text(json.dumps(audit.to_json(), indent=2, allow_nan=False) + "\n")
    print(audit_table(audit))
    print(f"K/V may be used across: {audit.scope}; append: {audit.append}")
    print(f"wrote {output / AUDIT_FILE}")


if __name__ == "__main__":
    run(main)
