"""Make ``python -m torchrec_kvshare NAME`` the same as ``kvshare NAME``."""

from torchrec_kvshare.commands.run import kvshare

if __name__ == "__main__":
    kvshare()
