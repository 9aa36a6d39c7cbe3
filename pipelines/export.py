"""Export a trained run to serve it elsewhere: ``python -m pipelines.export run=DIR``."""

import sys
import tempfile
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig

from torchrec_kvshare.config import ExportConfig, checked, literal_overrides
from torchrec_kvshare.export.exporter import TORCHSCRIPT, export_model
from torchrec_kvshare.export.triton import write_repository
from torchrec_kvshare.ranking import RankingModel
from torchrec_kvshare.training.run import load_trained, provenance_of

TRITON = "triton"


@hydra.main(version_base="1.3", config_path="../configs", config_name="export")
def main(composed: DictConfig) -> None:
    """Load the run, export it, say what parity was found."""
    config = checked(composed, ExportConfig)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    output = Path(config.output)
    model, schema = load_trained(Path(config.run))
    ranking = RankingModel(model, config.body).eval()
    provenance = {"licence": config.licence} | provenance_of(Path(config.run))
    if config.target == TRITON:
        with tempfile.TemporaryDirectory() as folder:
            artifact = Path(folder) / "artifact"
            manifest = export_model(
                ranking, schema, artifact, TORCHSCRIPT, config.tables, provenance
            )
            write_repository(artifact, output, config.name)
    else:
        manifest = export_model(ranking, schema, output, config.target, config.tables, provenance)
    print(f"model {manifest.model_version}; greatest logit differences: {manifest.parity}")
    print(f"wrote {output}")


if __name__ == "__main__":
    sys.argv = literal_overrides(sys.argv)
    main()
