"""The fixture that runs a module's tests once for each way in which the sandbox's root can be made on this machine."""

import shutil
from contextlib import contextmanager

import pytest

from rewards.sandbox import SandboxError, close, layers

OWN, BUBBLEWRAP = "rewards.sandbox", "bubblewrap"


def made_by() -> str:
    """What makes the root with the PATH as it is, in words."""
    try:
        return layers()["root"].split("made by ")[1]
    except SandboxError as error:
        return str(error)
    finally:
        close()


MADE_BY = made_by()


@contextmanager
def path_without_bubblewrap(folder):
    """The PATH is `folder`, with what these tests call."""
    with pytest.MonkeyPatch.context() as patch:
        for tool in ("sh", "sleep", "unshare"):
            (folder / tool).symlink_to(shutil.which(tool))
        patch.setenv("PATH", str(folder))
        yield


@pytest.fixture(scope="module", autouse=True, params=[OWN, BUBBLEWRAP] if MADE_BY.startswith(BUBBLEWRAP) else [OWN])
def maker(request, tmp_path_factory):
    """What makes the root: this package's own calls, where `bwrap` is not on the PATH, or bubblewrap."""
    close()
    if request.param == OWN:
        with path_without_bubblewrap(tmp_path_factory.mktemp("path")):
            yield OWN
    else:
        yield BUBBLEWRAP
    close()
