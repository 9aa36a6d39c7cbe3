"""Export a trained run to TorchScript: ``python -m pipelines.export run=DIR``."""

import sys
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig

from torchrec_kvshare.config import ExportConfig, checked, literal_overrides
from torchrec_kvshare.export.torchscript import export_torchscript
from torchrec_kvshare.ranking import RankingModel
from torchrec_kvshare.training.run import load_trained


@hydra.main(version_base="1.3", config_path="../configs", config_name="export")
def main(composed: DictConfig) -> None:
    """Load the run, export it, say what parity was found."""
    config = checked(composed, ExportConfig)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    model, schema = load_trained(Path(config.run))
    ranking = RankingModel(model, config.body).eval()
    manifest = export_torchscript(ranking, schema, Path(config.output))
    print(f"model {manifest.model_version}; greatest logit differences: {manifest.parity}")
    print(f"wrote {config.output}")


if __name__ == "__main__":
    sys.argv = literal_overrides(sys.argv)
    main()
