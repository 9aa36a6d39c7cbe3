"""Export a trained run for serving: ``python -m pipelines.export run=DIR``."""

import tempfile
from pathlib import Path

import hydra

from torchrec_kvshare.cache.keys import read_key
from torchrec_kvshare.commands.run import pipeline, run
from torchrec_kvshare.config import ExportConfig
from torchrec_kvshare.export.exporter import TORCHSCRIPT, export_model
from torchrec_kvshare.export.triton import write_repository
from torchrec_kvshare.model.ranking import RankingModel
from torchrec_kvshare.training.run import load_trained, provenance_of
from torchrec_kvshare.verify.deterministic import compute_rows_alone

TRITON = "triton"


@hydra.main(version_base="1.3", config_path="../configs", config_name="export")
@pipeline(ExportConfig)
def main(config: ExportConfig) -> None:
    """Load the run, export it, print the parity that was measured."""
    output = Path(config.output)
    model, schema = load_trained(Path(config.run))
    ranking = RankingModel(model).eval()
    if config.deterministic:
        ranking = compute_rows_alone(ranking)
    key = read_key(config.artifact_key_file, "artifact_key_file")
    provenance = {"licence": config.licence} | provenance_of(Path(config.run))
    if config.target == TRITON:
        with tempfile.TemporaryDirectory() as folder:
            artifact = Path(folder) / "artifact"
            manifest = export_model(
                ranking,
                schema,
                artifact,
                runtime=TORCHSCRIPT,
                tables=config.tables,
                provenance=provenance,
                key=key,
            )
            write_repository(artifact, output, config.name, config.artifact_key_file)
    else:
        manifest = export_model(
            ranking,
            schema,
            output,
            runtime=config.target,
            tables=config.tables,
            provenance=provenance,
            key=key,
        )
    print(f"model {manifest.model_version}; greatest logit differences: {manifest.parity}")
    print(f"wrote {output}")


if __name__ == "__main__":
    run(main)
