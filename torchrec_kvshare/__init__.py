"""Encode a user's history once, share its K/V with every candidate of a TorchRec ranking model.

Import from the rooms, along the data's way: ``data``, ``features``, ``attention``, ``history``,
``collection``, ``cache``, ``engine``. Nothing is imported here, so that ``attention`` needs torch
alone.
"""

__version__ = "0.1.0"
