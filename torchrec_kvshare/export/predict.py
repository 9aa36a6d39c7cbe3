"""A ranking model for hosts of ``torchrec.inference``: a factory, and the module that it makes.

A batch is the plain tensors of ``tensors.input_specs``. The module builds TorchRec's batches
itself: a TorchRec host has the same number of rows for all features of a request, while ours has
one row for the user and one for each candidate. The module keeps no K/V, so calls may overlap.
"""

import warnings
from typing import Any

from torch import Tensor, nn
from torchrec.fx import symbolic_trace
from torchrec.inference.modules import (
    BatchingMetadata,
    PredictFactory,
    PredictModule,
    QualNameMetadata,
)

from torchrec_kvshare.export.program import RankingProgram
from torchrec_kvshare.export.torchscript import script_model
from torchrec_kvshare.export.weights import check_weights
from torchrec_kvshare.features.schema import FeatureSchema, score_name
from torchrec_kvshare.features.tensors import input_specs
from torchrec_kvshare.model.quantised import FLOAT32, quantise_tables, shard_tables
from torchrec_kvshare.model.ranking import RankingModel

CPU = "cpu"
# TorchRec's names for an input of one tensor, and for one of values and lengths.
ONE_TENSOR, JAGGED = "dense", "sparse"


class KVSharePredictModule(PredictModule):
    """Requests as tensors in, probabilities out.

    Args:
        program: a ``RankingProgram``, eager or loaded from an artifact.
    """

    names: list[str]

    def __init__(self, program: RankingProgram) -> None:
        super().__init__(program, CPU)
        self.names = [score_name(task) for task in program.task_names()]

    def predict_forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the probabilities [C] float64 of all candidates by ``score_name`` of each task."""
        scores = self.predict_module(batch)
        return {name: scores[:, task] for task, name in enumerate(self.names)}


class KVSharePredictFactory(PredictFactory):
    """Makes predict modules of one trained model.

    Args:
        model: trained, in eval mode, with float tables; it is not changed.
        schema: its columns.
        model_version: the version that its answers have.
        table_dtype: of the embedding tables, see ``quantise_tables``.

    Example:
        >>> from torchrec_kvshare.features.schema import History, Vocabulary, Window
        >>> from torchrec_kvshare.history.kinds import TowerSpec
        >>> from torchrec_kvshare.model.ranking import dlrm_with_history
        >>> vocabularies = {"user_id": Vocabulary(["u"]), "item_id": Vocabulary(["a", "b"])}
        >>> histories = (History("history", Window(8, 4)),)
        >>> schema = FeatureSchema(vocabularies, histories=histories)
        >>> dlrm = dlrm_with_history(schema, TowerSpec("causal", 16, 2, 4), [8, 1])
        >>> factory = KVSharePredictFactory(RankingModel(dlrm.eval()), schema, "a-b", "int8")
        >>> type(factory.create_predict_module()).__name__
        'KVSharePredictModule'
        >>> factory.batching_metadata()["candidates.item_id"]
        BatchingMetadata(type='sparse', device='cpu', pinned=[])
    """

    def __init__(
        self,
        model: RankingModel,
        schema: FeatureSchema,
        model_version: str,
        table_dtype: str = FLOAT32,
    ) -> None:
        self.model = model
        self.schema = schema
        self.model_version = model_version
        self.table_dtype = table_dtype

    def create_predict_module(self, world_size: int = 1) -> KVSharePredictModule:
        """Make a module with quantised tables, spread over ``world_size`` ranks of this process.

        Raises:
            ArtifactError: if a weight is not finite.
            ConfigError: if the tables cannot be quantised or spread.
        """
        check_weights(self.model)
        if world_size == 1:
            model = quantise_tables(self.model, self.table_dtype)
        else:
            model = shard_tables(self.model, self.table_dtype, world_size)
        check_weights(model)
        program = RankingProgram(model, self.schema, self.model_version)
        return KVSharePredictModule(program).eval()

    def batching_metadata(self) -> dict[str, BatchingMetadata]:
        """Say how a host concatenates the inputs of several requests, by the input's name."""
        metadata = {}
        for spec in input_specs(self.schema):
            feature, _, part = spec.name.rpartition(".")
            if part in ("values", "lengths"):
                metadata[feature] = BatchingMetadata(JAGGED, CPU, [])
            else:
                metadata[spec.name] = BatchingMetadata(ONE_TENSOR, CPU, [])
        return metadata

    def result_metadata(self) -> str:
        """Return TorchRec's name of the result type; a host splits results by candidate counts."""
        return "dict_of_tensor"

    def qualname_metadata(self) -> dict[str, QualNameMetadata]:
        """Say that a host calls ``forward``, and needs no preprocessing: inputs are table rows."""
        return {"forward": QualNameMetadata(need_preproc=False)}

    def model_inputs_data(self) -> dict[str, Any]:
        """Return dtype, shape and range of each input, by name."""
        return {spec.name: spec.to_json() for spec in input_specs(self.schema)}

    def run_weights_independent_tranformations(self, predict_module: nn.Module) -> nn.Module:
        """Trace the module with the program as a leaf."""
        return symbolic_trace(predict_module, leaf_modules=[RankingProgram.__name__])

    def run_weights_dependent_transformations(self, predict_module: nn.Module) -> nn.Module:
        """Script the traced module, for processes without this package."""
        with warnings.catch_warnings():
            # A warning about fx's own module, whose annotations TorchScript does not read.
            warnings.filterwarnings("ignore", "The TorchScript type system", UserWarning)
            return script_model(predict_module)
