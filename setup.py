"""The one thing that setup.cfg has no key for: which C++ source is built, by attention/build.py."""

from setuptools import Extension, setup

SOURCE = "torchrec_kvshare/attention/operators.cpp"

setup(ext_modules=[Extension("torchrec_kvshare.attention._native", [SOURCE])])
