"""What tests that start processes share."""

import socket
from importlib.metadata import PackageNotFoundError, version

import pytest
from packaging.version import Version


def require(name, releases, library="torch"):
    """Skips `name` where the declared version of a package is too old for it; a library that is missing is a failure.

    Args:
        name: what is to be run.
        releases: by package, the least release that `name` needs.
        library: what carries `name`.
    """
    for package, least in releases.items():
        if Version(version(package)) < Version(least):
            pytest.skip(f"{name} needs {package} {least}; found {version(package)}")
    try:
        version(library)
    except PackageNotFoundError:
        pytest.fail(f"{name} is not tested, for {library} is missing: `make test-distributed` installs it")


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
