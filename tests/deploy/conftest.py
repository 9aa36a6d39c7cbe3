"""The exported model of the server's tests, for the cluster's tests too."""

from tests.serving.conftest import artifact as artifact
