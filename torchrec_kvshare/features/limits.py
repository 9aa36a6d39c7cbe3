"""What times, floats, ids and bags of ids may be at most, in logs, requests and tensors alike."""

MAX_TIME = 4_102_444_800  # 2100-01-01; a later time is milliseconds taken for seconds
MAX_FLOAT = 1e30
MAX_BAG_IDS = 10_000  # in one cell of a multi-valued column of a request
MAX_REQUEST_IDS = 1_000_000  # in the multi-valued columns of one request, all together
MAX_ID_CHARACTERS = 256  # of an id as it is compared; a UUID has 36, a SHA-512 in hexadecimal 128
