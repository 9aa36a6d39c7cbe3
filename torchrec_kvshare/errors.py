"""What can go wrong, drawn as a tree; beside each leaf, whose fault it is.

KVShareError
├── ConfigError (ValueError)         the config's author: a value or a combination that cannot work
├── DataError (ValueError)           the data set: a file, a column or a row that cannot be read
├── TrainingError (ArithmeticError)  the training's settings: numbers that are no longer finite
├── RequestError (ValueError)        the caller of the scorer: one request that cannot be scored
├── ShapeError (ValueError)          the caller of a function: tensors that do not fit each other
├── ArtifactError (RuntimeError)     the exporter: an artifact that is broken or does not fit
├── RecordError (ValueError)         a store's writer: K/V that is broken, forged or not ours
├── TierError (OSError)              a store behind the cache: it is dead, slow or full
├── ScoreError (ArithmeticError)     the model: scores of a request that are no finite numbers
├── ParityError (AssertionError)     us: two paths that must agree do not
├── OverloadError (RuntimeError)     the load: more is waiting than the server's limits allow
│   └── NoRoomError                  the load: messages hold more bytes than the server's limit
├── DeadlineError (TimeoutError)     the caller's patience: its deadline has passed
├── UnknownModelError (LookupError)  the caller of the server: a model that is not served
├── UnavailableError (RuntimeError)  the server: it has not started yet, or is about to stop
└── MissingExtraError (ImportError)  the installation: a component whose extra is not installed
"""


class KVShareError(Exception):
    """Root of everything this package raises on purpose."""


class ConfigError(KVShareError, ValueError):
    """A config value, or a combination of them, that cannot work."""


class DataError(KVShareError, ValueError):
    """A data set that cannot be read as it was described."""


class TrainingError(KVShareError, ArithmeticError):
    """A loss, a weight or a score that is no finite number: the training diverged."""


class RequestError(KVShareError, ValueError):
    """A request that cannot be scored; the message names the column and the value."""


class ShapeError(KVShareError, ValueError):
    """Tensors whose shapes do not fit each other."""


class ArtifactError(KVShareError, RuntimeError):
    """An exported artifact that is broken, incomplete or does not fit what it is used for."""


class RecordError(KVShareError, ValueError):
    """Bytes from a store that are not the K/V they should be: torn, forged or of another."""


class TierError(KVShareError, OSError):
    """A store behind a tier of the cache that does not do what it was asked."""


class ScoreError(KVShareError, ArithmeticError):
    """Scores of one request that are NaN or infinite; the message names its candidates."""


class ParityError(KVShareError, AssertionError):
    """Two paths that must give the same scores do not."""


class OverloadError(KVShareError, RuntimeError):
    """More is waiting than the server's limits allow; the caller may try again."""


class NoRoomError(OverloadError):
    """More bytes of messages are read or answered than the server's limit allows."""


class DeadlineError(KVShareError, TimeoutError):
    """The deadline of a request has passed before it was answered."""


class UnknownModelError(KVShareError, LookupError):
    """A model, or a version of it, that the server does not serve."""


class UnavailableError(KVShareError, RuntimeError):
    """A server that has not started yet, or is about to stop; another may answer."""


class MissingExtraError(KVShareError, ImportError):
    """A component whose optional packages are not installed.

    Args:
        extra: name of the extra in setup.cfg.
        purpose: what needs it, as the subject of the message.
    """

    def __init__(self, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the extra [{extra}]: pip install 'torchrec_kvshare[{extra}]'"
        )
