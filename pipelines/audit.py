"""Try a trained run against the cacheability contract: ``python -m pipelines.audit run=DIR``."""

import json
import sys
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig

from torchrec_kvshare.audit import audit_model, audit_table
from torchrec_kvshare.config import AuditConfig, checked, literal_overrides
from torchrec_kvshare.ranking import RankingModel
from torchrec_kvshare.training.run import load_trained

AUDIT_FILE = "audit.json"


@hydra.main(version_base="1.3", config_path="../configs", config_name="audit")
def main(composed: DictConfig) -> None:
    """Audit the run, print how far what moved, write audit.json."""
    config = checked(composed, AuditConfig)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    model, schema = load_trained(Path(config.run))
    audit = audit_model(RankingModel(model).eval(), schema, config.seed)
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / AUDIT_FILE).write_text(json.dumps(audit.to_json(), indent=2) + "\n")
    print(audit_table(audit))
    print(f"K/V may be used across: {audit.scope}; append: {audit.append}")
    print(f"wrote {output / AUDIT_FILE}")


if __name__ == "__main__":
    sys.argv = literal_overrides(sys.argv)
    main()
