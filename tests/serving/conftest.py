"""An exported model on a tiny world, made once and never changed."""

from pathlib import Path

import pytest

from tests.once import make_once, shared_folder
from tests.worlds import SCHEMA, make_dlrm
from torchrec_kvshare.export.exporter import export_model
from torchrec_kvshare.model.ranking import RankingModel


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = RankingModel(make_dlrm(1)).eval()
    folder = shared_folder(tmp_path_factory, "served")
    return make_once(folder / "artifact", lambda made: export_model(model, SCHEMA, made))
