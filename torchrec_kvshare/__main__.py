"""``python -m torchrec_kvshare NAME`` is ``kvshare NAME``, where no script is on the path."""

from torchrec_kvshare.commands.run import kvshare

if __name__ == "__main__":
    kvshare()
