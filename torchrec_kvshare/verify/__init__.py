"""Every proof that scores agree, run on the model itself.

- ``audit``: K/V of a history depends on nothing but that history.
- ``deterministic``: scores are bit-equal however the same candidates are batched and cached.
- ``parity``: the exported model scores as the eager one; cached, uncached and alone agree.
- ``codecs``: how far K/V in a codec, or tables in fewer bits, move the scores.
- ``golden``: a loaded artifact scores as it did when it was exported.
"""
