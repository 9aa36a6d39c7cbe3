"""Models that tests read and never change."""

import pytest
from torchrec.models.dlrm import DLRM

from tests.worlds import make_dlrm
from torchrec_kvshare.model.ranking import RankingModel


@pytest.fixture(scope="session")
def dlrm() -> DLRM:
    return make_dlrm(seed=3)


@pytest.fixture(scope="session")
def ranking_model(dlrm: DLRM) -> RankingModel:
    return RankingModel(dlrm).eval()
