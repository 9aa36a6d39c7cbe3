"""Upper limits of times, floats, ids and bags of ids, in logs, requests and tensors alike."""

MAX_TIME = 4_102_444_800  # 2100-01-01; a later one is probably in milliseconds
MAX_FLOAT = 1e30
MAX_BAG_IDS = 10_000  # in one cell of a multi-valued column of a request
MAX_REQUEST_IDS = 1_000_000  # in all multi-valued columns of one request together
MAX_ID_CHARACTERS = 256  # of a canonical id; a UUID has 36, a hexadecimal SHA-512 128
