"""Thin entry points: compose a config, call the library, write results."""

from torchrec_kvshare.commands.process import share_cores

share_cores()  # Before a pipeline imports torch, which reads the setting once.
