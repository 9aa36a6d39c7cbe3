"""What can go wrong, drawn as a tree; beside each error, whose fault it is.

KVShareError
├── ConfigError (ValueError)         the user of a command: a value or combination that cannot work
├── DataError (ValueError)           the data set: a file, a column or a row that cannot be used
├── TrainingError (ArithmeticError)  the training's settings: numbers that are no longer finite
├── RequestError (ValueError)        the caller of the scorer: a request that cannot be scored
├── ShapeError (ValueError)          the caller of a function: tensors or columns that do not match
├── ArtifactError (RuntimeError)     the artifact: broken, incomplete, or not for this use
├── RecordError (ValueError)         the writer of K/V: bytes torn, forged or of another user
├── TierError (OSError)              a store behind the cache: dead, slow or full
├── ScoreError (ArithmeticError)     the model: scores of a request that are not finite
├── ParityError (AssertionError)     us: two paths that must agree do not
├── OverloadError (RuntimeError)     the load: more requests or streams than the server's limits
│   └── NoRoomError                  the load: messages with more bytes than the server's limit
├── DeadlineError (TimeoutError)     the client: its deadline passed, or it sent or read too slowly
├── UnknownModelError (LookupError)  the caller of the server: a model that is not served
├── UnavailableError (RuntimeError)  the server: not ready, stopping, or a part of it is unreachable
└── MissingExtraError (ImportError)  the installation: a component whose extra is not installed
"""


class KVShareError(Exception):
    """Root of every error that this package raises on purpose."""


class ConfigError(KVShareError, ValueError):
    """A config value, or a combination of them, that cannot work."""


class DataError(KVShareError, ValueError):
    """A data set that cannot be read as described, or has nothing to train or test on."""


class TrainingError(KVShareError, ArithmeticError):
    """A loss, a weight or a score that is not finite: the training diverged."""


class RequestError(KVShareError, ValueError):
    """A request that cannot be scored; the message names the column and the value."""


class ShapeError(KVShareError, ValueError):
    """Tensors whose shapes, or columns whose lengths, do not fit each other."""


class ArtifactError(KVShareError, RuntimeError):
    """An exported artifact that is broken, incomplete or does not fit what it is used for."""


class RecordError(KVShareError, ValueError):
    """Bytes that are not the K/V asked for, or K/V that a codec cannot write."""


class TierError(KVShareError, OSError):
    """An operation that the store behind a cache tier did not complete."""


class ScoreError(KVShareError, ArithmeticError):
    """Scores of one request that are NaN or infinite; the message names its candidates."""


class ParityError(KVShareError, AssertionError):
    """Two paths that must give the same scores do not."""


class OverloadError(KVShareError, RuntimeError):
    """More requests or streams than the server's limits allow; the caller may try again."""


class NoRoomError(OverloadError):
    """More bytes of messages in flight than the server's limit allows."""


class DeadlineError(KVShareError, TimeoutError):
    """A deadline passed before a request was read, scored or answered."""


class UnknownModelError(KVShareError, LookupError):
    """A model, or a version of it, that the server does not serve."""


class UnavailableError(KVShareError, RuntimeError):
    """A server, or a part of it, that cannot answer now: starting, stopping or unreachable."""


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
