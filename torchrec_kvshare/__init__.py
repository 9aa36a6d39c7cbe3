"""Encode a user's history once, share its K/V with every candidate of a TorchRec ranking model.

Import from the rooms; data walks down this list, and a room imports only from rooms above its own:

- ``errors``, ``config``: what can go wrong, schemas of ``configs/``
- ``features``: columns, requests checked, rows gathered into TorchRec batches
- ``data``: interaction logs to training data
- ``attention``: the operators, their meaning and their backends
- ``history``: event tokens, encoder layers, ``HistoryTower``
- ``model``: ``KVShareEmbeddingBagCollection`` and ranking models with K/V as an input
- ``cache``: identity, pages, codecs, policies and tiers of K/V
- ``scoring``: the engine, where the cache meets the model
- ``verify``: every proof that scores agree
- ``training``: the loop, metrics, evaluation, checkpoints
- ``export``: artifacts, TorchScript, .pt2, the Triton repository
- ``serving``: the server round the engine
- ``deploy``: nginx, Redis, a local cluster
- ``benchmark``: harness and scenarios

``commands`` runs pipelines from the command line. Nothing is imported here, so that ``attention``
needs torch alone.
"""

__version__ = "0.1.0"
