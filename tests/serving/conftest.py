"""An exported model on a tiny world, made once and never changed."""

from pathlib import Path

import pytest

from tests.worlds import SCHEMA, make_dlrm
from torchrec_kvshare.export.exporter import export_model
from torchrec_kvshare.model.ranking import RankingModel


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "artifact"
    export_model(RankingModel(make_dlrm(1)).eval(), SCHEMA, folder)
    return folder
