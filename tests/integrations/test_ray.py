"""The same front on a Ray cluster of one node; what holds a build is what holds it locally."""

from __future__ import annotations

import subprocess
import sys

import pytest

from esper.errors import ForgeError
from esper.tezzeret.limits import Limits
from tests.tezzeret import forge_builds
from tests.tezzeret.forge_builds import Ask
from tests.tezzeret.test_forge import alive, until

SECONDS = 120


@pytest.mark.parametrize(
    ("module", "said"), [("forge", ""), ("train", "training on a Ray cluster needs ray[train]; ")]
)
def test_without_ray_the_error_is_its_pip_line(module: str, said: str) -> None:
    code = f"""
import sys
sys.modules["ray"] = None
from esper.errors import MissingExtraError
try:
    import esper.integrations.ray.{module}
except MissingExtraError as error:
    print(error)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.startswith(said)
    assert ran.stdout.endswith("install it with: pip install 'esper-morph[ray]'\n")


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore")  # Ray's own: sockets it leaves open, what it will rename
@pytest.mark.usefixtures("cluster")
def test_kernels_are_forged_on_a_cluster() -> None:
    from esper.integrations.ray.forge import RayForge

    with RayForge(forge_builds.build, limits=Limits(wall=20)) as forge:
        ticket = forge.submit(Ask(seed=4))
        assert forge.submit(Ask(seed=4)) is ticket
        made = ticket.result(SECONDS)
        assert made.weights == forge_builds.build(Ask(seed=4)).weights
        assert ticket.facts["held"]["file"] == "RLIMIT_FSIZE"
        with pytest.raises(ForgeError, match=r"exit status 3[\s\S]*2 attempts"):
            forge.submit(Ask("leaves_now")).result(SECONDS)
        pid = forge.submit(Ask(seed=6)).result(SECONDS).report["pid"]
        asleep = forge.submit(Ask("asleep"))
        until(lambda: asleep.state == "running")
        assert asleep.cancel()
        with pytest.raises(ForgeError, match="cancelled"):
            asleep.result(SECONDS)
        until(lambda: not alive(pid))
        last = forge.submit(Ask(seed=5)).result(SECONDS).report["pid"]
    until(lambda: not alive(last))
    with pytest.raises(ForgeError, match="closed"):
        forge.submit(Ask())
