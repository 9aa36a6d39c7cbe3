"""The C++ source to build with attention/build.py; setup.cfg has no key for it."""

from setuptools import Extension, setup

SOURCE = "torchrec_kvshare/attention/operators.cpp"

setup(ext_modules=[Extension("torchrec_kvshare.attention._native", [SOURCE])])
